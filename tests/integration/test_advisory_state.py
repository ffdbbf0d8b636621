"""What no WAL describes and a compute on an empty disk should find all the same: free-space maps (rule V8); and what the
agent is told while it runs: where shards are."""

import os
import signal
import stat
from pathlib import Path
from typing import cast

import pytest

from lakebase_testing.admin import Json
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import give_to_postgres, scratch
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.ports import free_port
from lakebase_testing.postgres import Connection, StockServer, amcheck, number, run_as_postgres, value
from lakebase_testing.waiting import wait_for

_ROWS = 20_000
# Nothing but VACUUM by hand changes free space.
_PARAMETERS = {"autovacuum": "off"}


def size(connection: Connection) -> int:
    """Blocks of the table."""
    return number(connection, "select pg_relation_size('t') / 8192")


def make_half_empty_table(connection: Connection) -> int:
    """Makes a table in which each page is half empty, and VACUUM has found that; returns its length in blocks."""
    connection.execute("create table t (i int primary key, note text)")
    connection.execute("insert into t select i, repeat('x', 300) from generate_series(1, %s) i", (_ROWS,))
    connection.execute("delete from t where i % 2 = 0")
    connection.execute("vacuum t")
    return size(connection)


def assert_space_is_used_again(writer: Writer, blocks: int) -> None:
    """Inserts almost as much as was deleted: with the map the table does not grow, without it by 40 of 100 blocks."""
    with writer.connect() as connection:
        assert size(connection) == blocks
        insert = "insert into t select i, repeat('y', 300) from generate_series(2, %s, 2) i where i %% 10 <> 0"
        connection.execute(insert, (_ROWS,))
        assert size(connection) <= blocks + 1
        assert number(connection, "select count(*) from t") == _ROWS * 9 // 10
    # PostgreSQL zeroes pages of the map that it does not like, and says so.
    assert "invalid page" not in writer.postgres_log.read_text(errors="replace")


def test_free_space_is_found_after_a_clean_stop() -> None:
    """Or each planned restart would make tables grow."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer(_PARAMETERS)
        with writer.connect() as connection:
            blocks = make_half_empty_table(connection)
        writer.stop_cleanly()

        writer = cluster.start_writer(_PARAMETERS)

        assert_space_is_used_again(writer, blocks)
        amcheck(writer.port, ["postgres"])


def test_free_space_is_found_after_a_crash_some_time_after_a_checkpoint() -> None:
    """PostgreSQL writes the map at its checkpoint, and the agent hands it in a moment later."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer(_PARAMETERS)
        with writer.connect() as connection:
            connection.execute("checkpoint")
            blocks = make_half_empty_table(connection)
            before = writer.figure("free_space_maps_handed_in_total")
            connection.execute("checkpoint")
            wait_for("the map to be handed in", lambda: writer.figure("free_space_maps_handed_in_total") > before, 30)
        # Others may be under way, but the page service has what was there at the checkpoint within seconds.
        settled = [-1]

        def is_settled() -> bool:
            settled.append(writer.figure("free_space_maps_handed_in_total"))
            return len(settled) > 20 and len(set(settled[-20:])) == 1

        wait_for("the rest to be handed in", is_settled, 60)
        writer.process.kill()

        writer = cluster.start_writer(_PARAMETERS)

        assert_space_is_used_again(writer, blocks)


def test_free_space_is_found_although_the_page_server_dies_with_its_disk() -> None:
    """It forgets what it was given since its last layer; the agent sees a new connection, and hands everything in again."""
    with LocalCluster(page_service=PageServiceSettings(shards=1, freeze_interval="1h")) as cluster:
        cluster.expect_log("no connection to the page server", "no WAL from a safekeeper", "not with the page service")
        writer = cluster.start_writer(_PARAMETERS)
        with writer.connect() as connection:
            blocks = make_half_empty_table(connection)
            before = writer.figure("free_space_maps_handed_in_total")
            connection.execute("checkpoint")
            wait_for("the map to be handed in", lambda: writer.figure("free_space_maps_handed_in_total") > before, 30)
            before = writer.figure("free_space_maps_handed_in_total")
            cluster.page_servers[0].kill()
            cluster.restart_page_server(cluster.page_servers[0], disk=False)
            wait_for(
                "the map to be handed in again", lambda: writer.figure("free_space_maps_handed_in_total") > before, 60
            )
        writer.process.kill()

        writer = cluster.start_writer(_PARAMETERS)

        assert_space_is_used_again(writer, blocks)


def test_the_map_of_a_table_that_shrank_or_went_says_nothing() -> None:
    """A map that names blocks behind the end of its table, or of a table that is gone, must harm nobody."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer(_PARAMETERS)
        with writer.connect() as connection:
            make_half_empty_table(connection)
            connection.execute("create table gone as select * from t")
            connection.execute("delete from gone where i % 3 = 0")
            connection.execute("vacuum gone")
            gone = value(connection, "select pg_relation_filepath('gone')")
            before = writer.figure("free_space_maps_handed_in_total")
            connection.execute("checkpoint")
            wait_for("maps to be handed in", lambda: writer.figure("free_space_maps_handed_in_total") >= before + 2, 30)
            # Neither is in a checkpoint before the end.
            connection.execute("delete from t where i > 100")
            connection.execute("vacuum t")
            connection.execute("drop table gone")
            blocks = size(connection)
        writer.process.kill()

        writer = cluster.start_writer(_PARAMETERS)

        assert not (writer.pgdata / f"{gone}_fsm").exists()
        with writer.connect() as connection:
            assert size(connection) == blocks
            connection.execute("insert into t select i, 'new' from generate_series(100001, 101000) i")
            assert number(connection, "select count(*) from t") == 1050
        amcheck(writer.port, ["postgres"])
        assert "invalid page" not in writer.postgres_log.read_text(errors="replace")


def shards_body(cluster: LocalCluster, version: int) -> Json:
    """The map of the cluster's page servers as they are."""
    shards = [
        {
            "shard": server.shard,
            "generation": server.generation,
            "begin": server.begin,
            "end": server.end,
            "pages": f"127.0.0.1:{server.reached_at}",
        }
        for server in cluster.page_servers
    ]
    return {"version": version, "shards": shards}


def is_running_anew(writer: Writer, before: object) -> bool:
    """Whether another PostgreSQL serves: for a moment the state is that of one that has just ended, without a process."""
    status = writer.status()
    return status["state"] == "running" and status["postgres_pid"] not in (None, before)


def test_a_shard_moves_while_the_writer_runs() -> None:
    """The owner of a shard is another process at another place from now on: no restart, and no query that fails."""
    settings = PageServiceSettings(shards=2, evict="always")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("no connection to the page server", "no WAL from a safekeeper", "not with the page service")
        cluster.expect_log("was ended by signal 9: recovering from the safekeepers")
        writer = cluster.start_writer({"shared_buffers": "1MB"})
        with writer.connect() as connection:
            connection.execute("create table t as select i, repeat('x', 500) note from generate_series(1, 20000) i")
            pid = writer.status()["postgres_pid"]
            for version, server in enumerate(cluster.page_servers, start=1):
                server.kill()
                server.ports["pages"] = free_port()
                server.reached_at = server.ports["pages"]
                cluster.restart_page_server(server, disk=version == 1)

                reply = writer.admin.call("PUT", "/v1/shards", shards_body(cluster, version))

                assert reply.status == 200, reply.text
                connection.execute("update t set i = i + 1")
                assert number(connection, "select count(*) from t where length(note) = 500") == 20_000
            status = writer.status()
            assert status["shard_map"] == shards_body(cluster, 2)
            assert status["postgres_pid"] == pid

            # Maps never go back, and a call may be repeated.
            assert writer.admin.call("PUT", "/v1/shards", shards_body(cluster, 2)).status == 200
            assert writer.admin.call("PUT", "/v1/shards", shards_body(cluster, 1)).error == "stale_version"
            holed = shards_body(cluster, 3)
            cast("list[Json]", holed["shards"]).pop()
            refused = writer.admin.call("PUT", "/v1/shards", holed)
            assert (refused.status, refused.error) == (400, "bad_request")
            assert writer.status()["shard_map"] == shards_body(cluster, 2)
            assert number(connection, "select count(*) from t") == 20_000
        os.kill(cast("int", pid), signal.SIGKILL)
        # The next attempt finds page servers where they are now.
        wait_for("another PostgreSQL", lambda: is_running_anew(writer, pid), 60)
        with writer.connect() as connection:
            assert number(connection, "select count(*) from t") == 20_000


@pytest.mark.parametrize("how", ["the postmaster is killed", "a backend is killed"])
def test_postgresql_ends_uncleanly_and_the_agent_starts_it_again(how: str) -> None:
    """With no block kept: what the next attempt reads is what page servers have, and nothing of the attempt before."""
    with LocalCluster(page_service=PageServiceSettings(shards=2, evict="always", ingest_delay_ms=5)) as cluster:
        cluster.expect_log("WAL is delayed at random", "recovering from the safekeepers")
        writer = cluster.start_writer({"shared_buffers": "1MB"})
        with writer.connect() as connection:
            connection.execute("create table t (i int primary key, note text)")
        for attempt in range(3):
            pid = cast("int", writer.status()["postgres_pid"])
            connection = writer.connect()
            first = attempt * 1000
            rows = "insert into t select i, repeat('x', 300) from generate_series(%s::int, %s::int) i"
            connection.execute(rows, (first, first + 999))
            connection.execute("begin")
            connection.execute("update t set note = 'never committed'")
            backend = number(connection, "select pg_backend_pid()")
            victims = [p for p in writer.postgres_pids() if p == pid] if "postmaster" in how else [backend]
            if victims == [backend]:
                with writer.connect() as other:
                    other.execute("checkpoint")
                os.kill(local_pid(writer, backend), signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
            wait_for("the next attempt", lambda pid=pid: runs_another(writer, pid), 60)
            connection.close()
            with writer.connect() as connection:
                assert number(connection, "select count(*) from t where length(note) = 300") == first + 1000
        amcheck(writer.port, ["postgres"])


def runs_another(writer: Writer, pid: int) -> bool:
    """Whether another PostgreSQL than that one accepts connections."""
    status = writer.status()
    return status["state"] == "running" and status["postgres_pid"] not in (None, pid)


def local_pid(writer: Writer, backend: int) -> int:
    """The process id here of a backend that may see another one in its PID namespace."""
    for pid in writer.postgres_pids():
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:") and int(line.split()[-1]) == backend:
                return pid
    raise AssertionError(f"no process {backend}")


def test_pgdata_says_that_it_is_a_cache() -> None:
    """Tools that copy files would copy holes: they fail. `pg_basebackup` reads through PostgreSQL, and is right."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t as select i, repeat('x', 500) note from generate_series(1, 20000) i")
            connection.execute("vacuum t")
        writer.process.kill()
        writer = cluster.start_writer()
        [sentinel] = writer.pgdata.glob("*THIS_IS_A_CACHE_NOT_A_DATABASE")
        assert stat.S_IMODE(sentinel.stat().st_mode) == 0

        copy = writer.data / "run" / "copy.tar"
        archive = run_as_postgres("/usr/bin/tar", "-cf", str(copy), "-C", str(writer.pgdata), ".", check=False)
        assert archive.returncode != 0
        assert sentinel.name in archive.stderr

        directory = give_to_postgres(scratch("copy"))
        (directory / "server").mkdir()
        backup = directory / "backup"
        run_as_postgres("pg_basebackup", "-d", writer.dsn(), "-D", str(backup), "-X", "fetch", "--checkpoint=fast")
        assert not list(backup.glob("*CACHE*"))
        server = StockServer.create(directory / "server", backup, settings={"full_page_writes": "on"})
        server.start()
        with server.connect() as connection:
            assert number(connection, "select sum(length(note)) from t") == 500 * 20_000
        amcheck(server.port, ["postgres"])
        server.stop()
