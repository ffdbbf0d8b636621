"""Pages live on page servers over object storage: computes and page servers may lose their disks."""

import pytest

from lakebase_testing.clients import Inserters, Pgbench, create_table, stored_ids, tpcb_sums
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.page_service import ObjectStorage, PageServiceSettings
from lakebase_testing.postgres import amcheck, number
from lakebase_testing.waiting import wait_for


def count(writer: Writer, statement: str) -> int:
    """The number that a statement returns, on a connection of its own."""
    with writer.connect() as connection:
        return number(connection, statement)


@pytest.mark.parametrize("shards", [1, 4])
def test_rows_survive_a_compute_on_an_empty_disk(shards: int) -> None:
    """The thin thread: WAL to safekeepers, from there to page servers, pages from there to the next compute."""
    with LocalCluster(page_service=PageServiceSettings(shards=shards)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t (id int primary key, note text)")
            connection.execute("insert into t select i, repeat('x', i % 700) from generate_series(1, 20000) i")
            connection.execute("delete from t where id % 3 = 0")
        writer.process.kill()

        successor = cluster.start_writer()

        assert count(successor, "select count(*) from t") == 13334
        assert count(successor, "select count(*) from t where length(note) <> id % 700") == 0
        amcheck(successor.port, ["postgres"])


def test_a_compute_that_is_stopped_cleanly_starts_again() -> None:
    """The planned restart of the same writer."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t as select generate_series(1, 1000) i")
        writer.stop_cleanly()

        cluster.restart_writer(writer)

        assert count(writer, "select count(*) from t") == 1000


@pytest.mark.parametrize("disk", [True, False], ids=["with its disk", "without its disk"])
@pytest.mark.parametrize("storage", ["file", "s3"], indirect=True)
def test_a_page_server_starts_again(storage: ObjectStorage, disk: bool) -> None:
    """What was in object storage comes from there, the rest from the safekeepers."""
    with LocalCluster(page_service=PageServiceSettings(shards=2, object_storage=storage)) as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t as select i, repeat('x', 500) note from generate_series(1, 20000) i")
        for page_server in cluster.page_servers:
            page_server.freeze()
        with writer.connect() as connection:
            connection.execute("insert into t select i, 'second' from generate_series(20001, 30000) i")

        for page_server in cluster.page_servers:
            page_server.kill()
            cluster.restart_page_server(page_server, disk=disk)
        writer.process.kill()
        successor = cluster.start_writer()

        assert count(successor, "select count(*) from t") == 30000
        assert count(successor, "select count(*) from t where note = 'second'") == 10000
        amcheck(successor.port, ["postgres"])


def test_page_servers_and_computes_die_under_load() -> None:
    """Every acknowledged id is there after each kind of loss, and pgbench's sums agree."""
    with LocalCluster(page_service=PageServiceSettings(shards=2, cache_bytes=64 << 20)) as cluster:
        cluster.expect_log("WARN", "ERROR")
        current = [cluster.start_writer()]
        Pgbench.initialise(current[0].dsn(), scale=2)
        with current[0].connect() as connection:
            create_table(connection)
        log = cluster.directory / "pgbench.log"
        with Inserters(lambda: current[0].dsn()) as inserters, Pgbench(lambda: current[0].dsn(), log) as pgbench:
            for step in range(4):
                wanted = inserters.count() + 200
                wait_for("200 more ids", lambda wanted=wanted: inserters.count() >= wanted, 60)
                victim = cluster.page_servers[step % len(cluster.page_servers)]
                victim.kill()
                cluster.restart_page_server(victim, disk=step % 2 == 0)
                if step % 2 == 1:
                    current[0].process.kill()
                    current[0] = cluster.start_writer()
                    inserters.drop_connections()
                    pgbench.restart()
        with current[0].connect() as connection:
            assert inserters.ids() <= stored_ids(connection)
            assert len(tpcb_sums(connection)) == 1
        assert inserters.count() >= 800
        amcheck(current[0].port, ["postgres"])


def test_every_block_is_evicted_after_each_access() -> None:
    """A page that was wrong once would be read again and again; eviction and writing race at every access."""
    with LocalCluster(page_service=PageServiceSettings(shards=2, evict="always", ingest_delay_ms=5)) as cluster:
        cluster.expect_log("WAL is delayed at random")
        writer = cluster.start_writer({"shared_buffers": "1MB"})
        Pgbench.initialise(writer.dsn(), scale=1)
        with Pgbench(writer.dsn, cluster.directory / "pgbench.log"):
            wait_for(
                "400 transactions",
                lambda: count(writer, "select count(*) from pgbench_history") > 400,
                120,
            )
        with writer.connect() as connection:
            assert len(tpcb_sums(connection)) == 1
        amcheck(writer.port, ["postgres"])
