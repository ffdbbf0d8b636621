"""What must hold after a run: each acknowledged id in a stock PostgreSQL fed by the safekeepers or out of an export, equal
bytes everywhere."""

import psycopg

from chaos.checks import Checks
from lakebase_testing.clients import stored_ids, tpcb_sums
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.followers import Receiver, standby, wait_replayed
from lakebase_testing.postgres import StockServer, format_lsn, run_as_postgres
from lakebase_testing.waiting import wait_for
from lakebase_testing.wal import assert_archive_equal, assert_files_equal, assert_safekeepers_equal


def judge(checks: Checks, cluster: LocalCluster, writer: Writer, receiver: Receiver, acknowledged: set[int]) -> None:
    """Adds the verdict on durability and equality; the writer still runs."""
    with writer.connect() as connection:
        checks.equal("acknowledged ids that the last writer lacks", len(acknowledged - stored_ids(connection)), 0)
        checks.equal("different sums in the last writer's TPC-B tables", len(tpcb_sums(connection)), 1)
    if cluster.page_servers:
        judge_page_servers(checks, cluster)
    end = cluster.wait_caught_up(120)
    # Where there are page servers the beginning may be in object storage only.
    start = max(cluster.positions("oldest_lsn"))
    size = end - start

    checks.equal("bytes equal on all safekeepers", assert_safekeepers_equal(cluster, start, end), size)
    receiver.wait_stored(end, 120)
    stored = assert_files_equal(cluster, receiver.directory, start, end, whole=True)
    checks.equal("bytes equal to what pg_receivewal stored", stored, size)
    if cluster.page_servers:
        # A compute that begins on an empty disk has no WAL from before: pages are compared by what is in them.
        receiver.stop()
        judge_archive(checks, cluster, receiver, start)
        judge_pages(checks, cluster, writer, acknowledged, end)
        return
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
    judge_server(checks, "a stock PostgreSQL fed by the safekeepers", server.port, acknowledged)
    server.stop()


def judge_page_servers(checks: Checks, cluster: LocalCluster) -> None:
    """Looks for page servers that do not recover, and for what they had to give up."""
    end = max(cluster.positions("commit_lsn"))
    cluster.wait_ingested(end, 120)
    for page_server in cluster.page_servers:
        page_server.freeze()
        wait_for(
            f"the troubles of {page_server.name} to end",
            lambda page_server=page_server: not page_server.status()["troubles"],
            60,
        )
        status = page_server.status()
        checks.at_least(f"durable position of {page_server.name}", lsn_of(status["durable_lsn"]), end)
        checks.equal(f"records that {page_server.name} could not follow", status["first_faults"], [])
        checks.equal(f"layers that {page_server.name} has lost", status["lost_layers"], {})


def judge_archive(checks: Checks, cluster: LocalCluster, receiver: Receiver, end: int) -> None:
    """Compares what safekeepers have removed with what pg_receivewal stored: object storage has it."""
    start = lsn_of(cluster.safekeepers[0].log_status()["start_lsn"])
    compared = assert_archive_equal(cluster, receiver.directory, start, end)
    checks.equal("bytes of removed WAL equal in the archive", compared, end - start)


def judge_pages(checks: Checks, cluster: LocalCluster, writer: Writer, acknowledged: set[int], end: int) -> None:
    """Reads everything from page servers, twice: through a compute on an empty disk, and out of an export."""
    out = cluster.directory / "out"
    cluster.export(out, "--at", format_lsn(end))
    sound = run_as_postgres("pg_checksums", "--check", "--pgdata", str(out), check=False)
    checks.holds("pg_checksums of the export is clean", sound.returncode == 0, sound.stderr.strip()[:500])
    directory = cluster.directory / "stock"
    directory.mkdir()
    server = StockServer.create(directory, out)
    server.start()
    judge_server(checks, "a stock PostgreSQL out of an export", server.port, acknowledged)
    server.stop()

    writer.process.kill()
    successor = cluster.start_writer()
    judge_server(checks, "a compute on an empty disk", successor.port, acknowledged)


def judge_server(checks: Checks, name: str, port: int, acknowledged: set[int]) -> None:
    """Looks for the acknowledged ids, equal sums and sound indexes in a server."""
    dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = stored_ids(connection)
        checks.equal(f"acknowledged ids that {name} lacks", len(acknowledged - found), 0)
        checks.at_least(f"ids in {name}, acknowledged or in doubt", len(found), len(acknowledged))
        checks.equal(f"different sums in the TPC-B tables of {name}", len(tpcb_sums(connection)), 1)
    check = run_as_postgres(
        "pg_amcheck", "--host=127.0.0.1", f"--port={port}", "--username=postgres", "--heapallindexed", "postgres",
        check=False,
    )  # fmt: skip
    remark = (check.stdout + check.stderr).strip()[:500]
    checks.holds(f"pg_amcheck --heapallindexed of {name} is clean", check.returncode == 0, remark)
