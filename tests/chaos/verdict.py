"""What must hold after a run: each acknowledged id in a stock PostgreSQL fed by the safekeepers, equal bytes everywhere."""

from chaos.checks import Checks
from lakebase_testing.clients import stored_ids, tpcb_sums
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.followers import Receiver, standby, wait_replayed
from lakebase_testing.postgres import run_as_postgres
from lakebase_testing.waiting import wait_for
from lakebase_testing.wal import assert_files_equal, assert_safekeepers_equal


def judge(checks: Checks, cluster: LocalCluster, writer: Writer, receiver: Receiver, acknowledged: set[int]) -> None:
    """Adds the verdict on durability and equality; the writer still runs."""
    start = lsn_of(cluster.safekeepers[0].log_status()["start_lsn"])
    with writer.connect() as connection:
        checks.equal("acknowledged ids that the last writer lacks", len(acknowledged - stored_ids(connection)), 0)
        checks.equal("different sums in the last writer's TPC-B tables", len(tpcb_sums(connection)), 1)
    end = cluster.wait_caught_up(120)
    size = end - start

    checks.equal("bytes equal on all safekeepers", assert_safekeepers_equal(cluster, start, end), size)
    receiver.wait_stored(end, 120)
    stored = assert_files_equal(cluster, receiver.directory, start, end, whole=True)
    checks.equal("bytes equal to what pg_receivewal stored", stored, size)
    held = assert_files_equal(cluster, writer.pgdata / "pg_wal", start, end, whole=False)
    checks.at_least("bytes equal to what the writer's pg_wal holds", held, 1)
    receiver.stop()

    server = standby(cluster, "stock")
    server.start()
    wait_replayed(server, end, 300)
    with server.connect() as connection:
        connection.execute("select pg_promote()")
        in_recovery = "select 1 where not pg_is_in_recovery()"
        wait_for("the promotion", lambda: connection.execute(in_recovery).fetchone(), 60)
        found = stored_ids(connection)
        checks.equal(
            "acknowledged ids that a stock PostgreSQL fed by the safekeepers lacks", len(acknowledged - found), 0
        )
        checks.at_least("ids in it, acknowledged or in doubt", len(found), len(acknowledged))
        checks.equal("different sums in its TPC-B tables", len(tpcb_sums(connection)), 1)
    check = run_as_postgres(
        "pg_amcheck", "--host=127.0.0.1", f"--port={server.port}", "--username=postgres", "--heapallindexed", "postgres",
        check=False,
    )  # fmt: skip
    checks.holds(
        "pg_amcheck --heapallindexed is clean", check.returncode == 0, (check.stdout + check.stderr).strip()[:500]
    )
    server.stop()
