"""P11: warm reads through the virtual disk against stock PostgreSQL, and what one intercepted call costs."""

import shutil
import time
from contextlib import ExitStack

import psycopg

from bench.databases import pgbench_database
from bench.report import Row, compare, fact
from bench.servers import pgbench
from lakebase_testing.cluster import LocalCluster
from lakebase_testing.environment import scratch
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import StockServer

ROUNDS = 3
SECONDS = 4
SCALE = 20
# Far below the size of the tables: nearly every transaction reads from the file, which the kernel has cached.
SETTINGS = {"shared_buffers": "32MB", "autovacuum": "off", "jit": "off", "max_connections": "100"}


def _warm_up(port: int) -> None:
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True) as connection:
        connection.execute("create extension if not exists pg_prewarm")
        connection.execute("select pg_prewarm(oid) from pg_class where relkind in ('r', 'i', 't')")


def _scan_microseconds(port: int, blocks: int) -> float:
    """Time of one read of the table from its file, per block: `smgrread` and nothing else."""
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True) as connection:
        begun = time.perf_counter()
        connection.execute("select pg_prewarm('pgbench_accounts', 'read')")
        return (time.perf_counter() - begun) / blocks * 1e6


def measure() -> list[Row]:
    """Alternates stock PostgreSQL and a writer whose cache has everything."""
    rates: list[tuple[float, float]] = []
    costs: list[tuple[float, float]] = []
    with ExitStack() as stack:
        database = stack.enter_context(pgbench_database(SCALE))
        directory = scratch("stock")
        stack.callback(shutil.rmtree, directory)
        stock = StockServer.create(directory, database.data, settings=SETTINGS)
        stock.start()
        stack.callback(stock.stop)
        service = PageServiceSettings(shards=1, freeze_bytes="64MiB", freeze_interval="60s")
        cluster = stack.enter_context(LocalCluster(members=1, backup=database.data, page_service=service))
        cluster.expect_log("WARN")
        writer = cluster.start_writer(SETTINGS)
        ports = (writer.port, stock.port)
        for port in ports:
            _warm_up(port)
        arguments = [
            "--select-only",
            "--no-vacuum",
            "--protocol=prepared",
            "--client=4",
            "--jobs=2",
            f"--time={SECONDS}",
        ]
        for port in ports:
            pgbench(port, *arguments)
        for number in range(ROUNDS):
            ours, reference = (pgbench(port, *arguments).tps for port in ports)
            rates.append((ours, reference))
            scans = [min(_scan_microseconds(port, database.accounts.blocks) for _ in range(3)) for port in ports]
            costs.append((scans[0], scans[1]))
            print(
                f"  round {number + 1}: {ours:.0f} / {reference:.0f} tps, a block {scans[0]:.2f} / {scans[1]:.2f} us",
                flush=True,
            )
    differences = sorted((ours - reference) * 1000 for ours, reference in costs)
    return [
        compare("P11", "pgbench -S, all in the cache on disk ÷ stock", "tps", rates, 1.0, "higher"),
        compare("P11-read", "read of a block of a cached file ÷ stock", "us", costs, None, "lower"),
        fact("P11-call", "an intercepted read costs beside the read", "ns", differences[len(differences) // 2]),
    ]
