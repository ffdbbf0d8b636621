"""The path of a commit: on a majority before it is acknowledged, found again after any end of the writer."""

import os
import re
import signal
import subprocess
import urllib.request

from lakebase_testing import procfs
from lakebase_testing.clients import Inserters, Pgbench, create_table, stored_ids, tpcb_sums
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.environment import environment, give_to_postgres, is_root
from lakebase_testing.postgres import Connection, parse_lsn
from lakebase_testing.waiting import wait_for


def flushed(connection: Connection) -> int:
    """The position up to which the writer's PostgreSQL believes its WAL to be durable."""
    row = connection.execute("select pg_current_wal_flush_lsn()::text").fetchone()
    assert row is not None
    return parse_lsn(row[0])


def mark_pgdata(writer: Writer) -> None:
    """Leaves a file that only survives if this very PGDATA is used again."""
    (writer.pgdata / "mark").touch()
    give_to_postgres(writer.pgdata / "mark")


def is_marked(writer: Writer) -> bool:
    """Whether PGDATA is the one that was marked."""
    return (writer.pgdata / "mark").exists()


def test_an_acknowledged_commit_is_on_a_majority() -> None:
    """The one promise of the system, looked at on the safekeepers' side."""
    with LocalCluster() as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
            for number in range(20):
                connection.execute("insert into acknowledged values (%s, 'x')", (number,))
                position = flushed(connection)
                durable = [lsn for lsn in cluster.positions("flush_lsn") if lsn >= position]

                assert len(durable) >= cluster.majority(), f"{position:X} is durable on {len(durable)} safekeepers"


def test_a_workload_leaves_the_same_log_everywhere() -> None:
    """pgbench and single inserts together; afterwards every safekeeper reports the same end."""
    with LocalCluster() as cluster:
        writer = cluster.start_writer()
        Pgbench.initialise(writer.dsn(), scale=1)
        with writer.connect() as connection:
            create_table(connection)
            with Inserters(writer.dsn) as inserters, Pgbench(writer.dsn, cluster.directory / "pgbench.log"):
                wait_for("200 acknowledgements", lambda: inserters.count() >= 200)

            assert inserters.ids() <= stored_ids(connection)
            assert len(tpcb_sums(connection)) == 1
        # PostgreSQL writes a little by itself; at some moment the writer and all safekeepers name the same position.
        wait_for("one end everywhere", lambda: cluster.wait_caught_up() == lsn_of(writer.status()["commit_lsn"]))


def test_a_clean_stop_keeps_pgdata() -> None:
    """The end of the local WAL equals the end of the log, so nothing needs to be restored."""
    with LocalCluster() as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
            connection.execute("insert into acknowledged values (1, 'x')")
        mark_pgdata(writer)

        writer.stop_cleanly()
        cluster.restart_writer(writer)

        assert is_marked(writer)
        with writer.connect() as connection:
            assert stored_ids(connection) == {1}


def test_a_killed_agent_takes_postgres_with_it() -> None:
    """A backend that outlives its agent could still answer its client (B6 of the design's findings)."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
            mark_pgdata(writer)
            postgres = writer.postgres_pids()
            assert len(postgres) >= 5, "checkpointer, background writer, WAL writer, our backend, the postmaster"

            writer.process.kill()

            wait_for("PostgreSQL to end", lambda: all(procfs.state(pid) in (None, "Z") for pid in postgres), 5)


def test_after_a_killed_agent_everything_acknowledged_is_found() -> None:
    """PGDATA is not trusted after an unclean end: it comes back from the base backup and the safekeepers."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
        with Inserters(writer.dsn) as inserters:
            for round_number in range(1, 4):
                wanted = inserters.count() + 200
                wait_for("200 acknowledgements", lambda wanted=wanted: inserters.count() >= wanted)
                mark_pgdata(writer)
                writer.process.kill()
                cluster.restart_writer(writer)
                assert not is_marked(writer), f"round {round_number}: PGDATA of an unclean end was used again"
        with writer.connect() as connection:
            assert inserters.ids() <= stored_ids(connection)


def test_a_killed_postgres_is_recovered_by_its_agent() -> None:
    """`restart_after_crash` is off: the agent elects itself again, restores and replays, without an operator."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN", "ERROR.*[Pp]ostgre")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
        with Inserters(writer.dsn) as inserters:
            for victim in ("postmaster", "checkpointer", "walwriter"):
                wanted = inserters.count() + 100
                wait_for("100 acknowledgements", lambda wanted=wanted: inserters.count() >= wanted)
                pids = writer.postgres_pids()
                of_interest = [pid for pid in pids if victim in procfs.command_line(pid)] or pids[:1]
                os.kill(of_interest[0], signal.SIGKILL)
                wait_for("the crash to be noticed", lambda: writer.state() != "running", 10)
                writer.wait_running()
        with writer.connect() as connection:
            assert inserters.ids() <= stored_ids(connection)


def test_postgres_refuses_the_library_without_an_agent() -> None:
    """Never a silent local-only commit: one clear line, and no server."""
    with LocalCluster() as cluster:
        writer = cluster.start_writer()
        writer.stop_cleanly()
        result = subprocess.run(
            [str(environment().postgres_bin / "postgres"), "-D", str(writer.pgdata), "-c", "port=1"],
            env={**os.environ, "LD_PRELOAD": str(environment().vfs)},
            user=environment().postgres_user if is_root() else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
            cwd="/",
        )

        assert result.returncode != 0
        assert "lakebase_vfs" in result.stderr


def metrics(port: int) -> str:
    """What a metrics port serves."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return response.read().decode()


def test_metrics_say_what_happens() -> None:
    """Prometheus text on a port of its own: positions of each safekeeper, state of the agent."""
    with LocalCluster() as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
        for safekeeper in cluster.safekeepers:
            text = metrics(safekeeper.ports["metrics"])
            assert re.search(r"^lakebase_safekeeper_flush_lsn\{.*\} [1-9]\d*$", text, re.MULTILINE)
            assert re.search(r"^lakebase_safekeeper_logs 1$", text, re.MULTILINE)
        assert re.search(r'^lakebase_\w+\{.*state="running".*\} 1$', metrics(writer.metrics_port), re.MULTILINE)
