"""P12: from nothing to the first row, and how fast a database is read that is not on this machine yet."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack

import psycopg

from bench.databases import Database, pgbench_database
from bench.pages import Toy
from bench.report import Row, compare, fact
from bench.servers import pgbench
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import scratch
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import StockServer, base_backup
from lakebase_testing.waiting import hold

ROUNDS = 5
# Scales of pgbench: 0.2 and 1 GB, and 5 GB where it is asked for.
SIZES = {"P12-200MB": 12, "P12-1GB": 66}
LARGE = {"P12-5GB": 330} if os.environ.get("LAKEBASE_BENCH_LARGE") else {}
TABLES = 10_000
SCAN_SIZE = "P12-1GB"
# How often a server that starts is asked.
INTERVAL_SECONDS = 0.002
LIMIT_SECONDS = 60
LEASE_SECONDS = 2
MAKE_TABLES = f"""
do $$ begin
  for i in 1..{TABLES} loop
    execute format('create table t%s (i int)', i);
    if i % 500 = 0 then commit; end if;
  end loop;
end $$
"""


def _first_row(dsn: str, statement: str, alive: Callable[[], bool]) -> None:
    """Asks until there is an answer."""
    limit = time.monotonic() + LIMIT_SECONDS
    while True:
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                assert connection.execute(statement.encode()).fetchone() is not None
                return
        except psycopg.OperationalError:
            assert alive(), "the server ended"
            assert time.monotonic() < limit, f"no first row within {LIMIT_SECONDS} s"
            time.sleep(INTERVAL_SECONDS)


def _start_stock(server: StockServer) -> float:
    """Seconds from the start of PostgreSQL to the first row."""
    begun = time.perf_counter()
    server.process.start()
    _first_row(server.dsn(), "select 1", lambda: server.process.is_running)
    seconds = time.perf_counter() - begun
    server.stop()
    return seconds


def _start_ours(cluster: LocalCluster, statement: str, parameters: dict[str, str]) -> tuple[Writer, float, float]:
    """A compute on an empty disk; seconds from its start, and from its grant on, to the first row."""
    writer = cluster.new_writer(parameters)
    begun = time.perf_counter()
    writer.process.start()
    while writer.state() is None:
        assert writer.process.is_running, writer.process.log_text()
        time.sleep(INTERVAL_SECONDS)
    granted = time.perf_counter()
    cluster.grant(writer)
    _first_row(writer.dsn(), statement, lambda: writer.process.is_running)
    end = time.perf_counter()
    return writer, end - begun, end - granted


def _cluster(database: Database) -> LocalCluster:
    service = PageServiceSettings(shards=4, freeze_bytes="64MiB", freeze_interval="60s")
    cluster = LocalCluster(backup=database.data, page_service=service)
    cluster.expect_log("WARN", "ERROR")
    return cluster


def _starts(
    name: str, what: str, cluster: LocalCluster, stock: StockServer, statement: str, goal: float | None = 5.0
) -> list[Row]:
    pairs: list[tuple[float, float]] = []
    since_grant: list[tuple[float, float]] = []
    for number in range(ROUNDS):
        reference = _start_stock(stock)
        # The read lease of the writer before: its successor answers nobody for so long after a kill, whatever it starts from.
        hold(LEASE_SECONDS)
        writer, ours, granted = _start_ours(cluster, statement, {"autovacuum": "off"})
        writer.process.kill()
        pairs.append((ours, reference))
        since_grant.append((granted, reference))
        print(
            f"  round {number + 1}: {what}: {ours * 1e3:.0f} ms ({granted * 1e3:.0f} from the grant on) / "
            f"{reference * 1e3:.0f} ms",
            flush=True,
        )
    return [
        compare(name, f"cold start to first row, {what} ÷ stock with an empty cluster", "s", pairs, goal, "lower"),
        compare(f"{name}-grant", "of that from the grant on", "s", since_grant, None, "lower"),
    ]


def _cold_reads(cluster: LocalCluster, database: Database) -> list[Row]:
    """A scan of a table, and random reads, by a compute that has nothing."""
    parameters = {"autovacuum": "off", "jit": "off", "max_parallel_workers_per_gather": "0", "shared_buffers": "128MB"}
    toy = Toy.build()
    scans: list[tuple[float, float]] = []
    selects: list[float] = []
    try:
        with toy.serve(32_768, on_disk=False) as server:
            for number in range(3):
                limit = toy.run(server, 32_768, 32, seconds=1).pages_per_second * 8192 / 1e6
                writer, _, _ = _start_ours(cluster, "select 1", parameters)
                begun = time.perf_counter()
                with writer.connect() as connection:
                    connection.execute("select sum(abalance) from pgbench_accounts")
                scans.append((database.accounts.blocks * 8192 / 1e6 / (time.perf_counter() - begun), limit))
                writer.process.kill()
                writer, _, _ = _start_ours(cluster, "select 1", parameters)
                selects.append(
                    pgbench(
                        writer.port, "--select-only", "--no-vacuum", "--protocol=prepared", "--client=8", "--jobs=2",
                        "--time=5",
                    ).tps
                )  # fmt: skip
                writer.process.kill()
                print(
                    f"  round {number + 1}: scan {scans[-1][0]:.0f} / {scans[-1][1]:.0f} MB/s, "
                    f"random {selects[-1]:.0f} tps",
                    flush=True,
                )
    finally:
        shutil.rmtree(toy.directory)
    return [
        compare("scan-cold", "sequential scan of a cold table ÷ limit of toy_pages", "MB/s", scans, None, "higher"),
        fact("select-cold", "pgbench -S, 8 clients, first 5 s of a cold compute", "tps", sorted(selects)[1]),
    ]


def measure() -> list[Row]:
    """Starts computes of databases of several sizes, and one with many relations."""
    rows: list[Row] = []
    with ExitStack() as stack:
        directory = scratch("stock")
        stack.callback(shutil.rmtree, directory)
        stock = StockServer.create(directory, base_backup(), settings={"autovacuum": "off"})
        for name, scale in {**SIZES, **LARGE}.items():
            statement = "select abalance from pgbench_accounts where aid = 4711"
            with pgbench_database(scale) as database, _cluster(database) as cluster:
                rows += _starts(name, f"{database.bytes / 1e9:.1f} GB", cluster, stock, statement)
                if name == SCAN_SIZE:
                    rows += _cold_reads(cluster, database)
        with pgbench_database(1, (MAKE_TABLES,)) as database, _cluster(database) as cluster:
            rows += _starts("P12-tables", f"{TABLES:,} tables", cluster, stock, "select count(*) from t17", None)
    small = next(row for row in rows if row.id == "P12-200MB")
    many = next(row for row in rows if row.id == "P12-tables")
    rows.append(fact("P12-relation", "of that for each relation", "us", (many.ours - small.ours) / TABLES * 1e6))
    return rows
