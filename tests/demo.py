"""`make demo`: PostgreSQL commits to a quorum and keeps nothing; safekeepers, page servers and the writer lose their lives and
disks; what was acknowledged is found again."""

import shutil
import sys
import time
from pathlib import Path

from lakebase_testing import procfs
from lakebase_testing.clients import Inserters, Pgbench, create_table, stored_ids, tpcb_sums
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import environment
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import StockServer, format_lsn, remove_templates, run_as_postgres
from lakebase_testing.waiting import hold, wait_for

_started = time.monotonic()


def say(text: str) -> None:
    """Tells the next part of the story."""
    print(f"[{time.monotonic() - _started:5.1f} s] {text}", flush=True)


def show_log(cluster: LocalCluster) -> None:
    """Prints where each safekeeper's log ends."""
    for safekeeper in cluster.safekeepers:
        status = safekeeper.log_status() if safekeeper.process.is_running else None
        end = f"durable to {status['flush_lsn']}, term {status['term']}" if status else "dead"
        print(f"            {safekeeper.name}: {end}", flush=True)


def main() -> int:
    """Tells the story; returns the exit status."""
    try:
        with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
            tell(cluster)
    finally:
        remove_templates()
    say("All processes have ended, all files are removed.")
    return 0


def tell(cluster: LocalCluster) -> None:
    """The story itself; every claim in it is checked."""
    cluster.expect_log("WARN", "ERROR")
    say(f"Three safekeepers and two page servers run on this machine, with mutual TLS, in {cluster.directory}.")
    say("A fresh PostgreSQL was imported: its pages are layers in object storage. Nobody needs its directory any more.")
    current: list[Writer] = [cluster.start_writer()]
    writer = current[0]
    version = writer.pgdata.joinpath("PG_VERSION").read_text().strip()
    say(f"{writer.name} runs a stock PostgreSQL {version} ({environment().postgres_bin}/postgres), term {writer.term}.")
    print(f"            try it: psql '{writer.dsn()}'", flush=True)
    Pgbench.initialise(writer.dsn(), scale=2)
    with writer.connect() as connection:
        create_table(connection)
    say("pgbench's tables are there. Load: pgbench (TPC-B), and clients that remember each id whose COMMIT came back.")

    log = Path(cluster.directory / "pgbench.log")
    with Inserters(lambda: current[0].dsn()) as inserters, Pgbench(lambda: current[0].dsn(), log) as pgbench:
        hold(5)
        say(f"{inserters.count()} ids are acknowledged.")
        show_log(cluster)

        victim = cluster.safekeepers[0]
        before = inserters.count()
        victim.kill()
        say(f"kill -9 {victim.name}. Two of three are a quorum: commits go on.")
        hold(4)
        assert inserters.count() > before, "commits stopped with one safekeeper"
        say(f"{inserters.count() - before} more ids were acknowledged without it.")

        postgres = writer.postgres_pids()
        acknowledged = inserters.ids()
        writer.process.kill()
        killed_at = time.monotonic()
        wait_for("PostgreSQL to die with its agent", lambda: all(procfs.state(p) in (None, "Z") for p in postgres))
        say(
            f"kill -9 {writer.name}: its agent, and with it all {len(postgres)} processes of PostgreSQL. Its disk is lost, too."
        )

        current[0] = successor = cluster.start_writer()
        say(
            f"Term {successor.term} was granted to {successor.name}: it started on an empty disk, reads pages as they are asked "
            f"for, and took over {time.monotonic() - killed_at:.1f} s after the kill."
        )
        with successor.connect() as connection:
            missing = acknowledged - stored_ids(connection)
        assert not missing, f"lost: {sorted(missing)[:10]}"
        say(f"All {len(acknowledged)} ids that were acknowledged before the kill are there.")

        inserters.drop_connections()
        pgbench.restart()
        for page_server in cluster.page_servers:
            page_server.kill()
            page_server.lose_disk()
        say("kill -9 both page servers, and their disks are lost. The writer goes on with the pages that it has.")
        hold(2)
        for page_server in cluster.page_servers:
            page_server.start()
        for page_server in cluster.page_servers:
            page_server.wait_ready()
        say("They start again: layers come from object storage, the rest of the log from the safekeepers.")
        victim.start()
        say(f"{victim.name} starts again and fetches what it missed; the load goes on.")
        wanted = inserters.count() + 200
        wait_for("200 more ids", lambda: inserters.count() >= wanted)

    end = cluster.wait_caught_up()
    say(f"The load has ended. The log ends at {format_lsn(end)} on every safekeeper.")
    show_log(cluster)

    out = cluster.directory / "out"
    cluster.export(out, "--at", format_lsn(end))
    run_as_postgres("pg_checksums", "--check", "--pgdata", str(out))
    directory = cluster.directory / "stock"
    directory.mkdir()
    stock = StockServer.create(directory, out)
    shutil.rmtree(out)
    stock.start()
    with stock.connect() as connection:
        missing = inserters.ids() - stored_ids(connection)
        sums = tpcb_sums(connection)
    assert not missing, f"lost: {sorted(missing)[:10]}"
    assert len(sums) == 1, f"inconsistent: {sums}"
    say(
        "The lakebase was exported as an ordinary data directory: its checksums are right, and a stock PostgreSQL without any "
        f"library of ours started on it. All {inserters.count()} acknowledged ids are in it, and pgbench's sums agree."
    )
    stock.stop()


if __name__ == "__main__":
    sys.exit(main())
