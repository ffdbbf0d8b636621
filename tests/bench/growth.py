"""P14: what ten times the data, and ten times the history, cost; storage amplification and memory beside it."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.append import cpu_seconds
from bench.databases import Database, pgbench_database
from bench.idle import resident_kib
from bench.pages import page_load, pageserver_cluster
from bench.reads import Reads
from bench.report import Row, compare, fact
from bench.servers import pgbench
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.page_service import PageServer, PageServiceSettings
from lakebase_testing.waiting import wait_for

SCALE = 5
TRANSACTIONS = 8_000
TIMES = 10
# The same working set everywhere: what grows is what lies around it.
PAGES_READ = 4096
ROUNDS = 3
SECONDS = 2
# So small that the history of one time goes through each kind of compaction: what grows is then history, not the number of
# layers that wait for the first one.
SERVICE = PageServiceSettings(shards=1, freeze_bytes="512KiB", freeze_interval="60s")
SETTINGS = {"shared_buffers": "1GB", "autovacuum": "off", "jit": "off"}


@dataclass(frozen=True)
class Grown:
    """What was measured on one lakebase."""

    layers: float
    blocks: float
    values: float
    read_cpu_us: float
    ingest_cpu_us_per_kib: float
    start_seconds: float
    object_bytes: int
    logical_bytes: int
    memory_bytes: float


def _settled(page_server: PageServer) -> None:
    """Everything is in object storage, and compaction has nothing left to do."""
    page_server.freeze()
    seen: list[tuple[object, ...]] = []

    def is_quiet() -> bool:
        status = page_server.status()
        seen.append(tuple(status[key] for key in ("image_layers", "level0_layers", "level1_layers", "waiting_layers")))
        # Looked at every 20 ms; a compaction of this size takes longer than a few looks.
        return len(seen) > 200 and len(set(seen[-200:])) == 1

    wait_for("compaction to end", is_quiet, 300)


def _load(cluster: LocalCluster, writer: Writer, page_server: PageServer, transactions: int) -> float:
    """Runs the load; returns the page server's CPU time for each KiB of WAL, in microseconds."""
    begin, cpu = lsn_of(page_server.status()["ingested_lsn"]), cpu_seconds(page_server.process.pid)
    pgbench(
        writer.port,
        "--no-vacuum",
        "--protocol=prepared",
        "--client=4",
        "--jobs=2",
        f"--transactions={transactions // 4}",
    )
    end = cluster.wait_caught_up()
    wait_for("the page server to catch up", lambda: lsn_of(page_server.status()["ingested_lsn"]) >= end, 120)
    spent = cpu_seconds(page_server.process.pid) - cpu
    return spent * 1e6 / ((end - begin) / 1024)


def _start_seconds(cluster: LocalCluster) -> float:
    times: list[float] = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        writer = cluster.start_writer(SETTINGS)
        with writer.connect() as connection:
            connection.execute("select abalance from pgbench_accounts where aid = 4711")
        times.append(time.perf_counter() - begun)
        writer.process.kill()
    return sorted(times)[len(times) // 2]


def _size(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def measure_one(database: Database, transactions: int) -> Grown:
    """One lakebase with so much data and so much history."""
    with pageserver_cluster(database, tls=False, settings=SERVICE) as cluster:
        page_server = cluster.page_servers[0]
        writer = cluster.start_writer(SETTINGS)
        if transactions > TRANSACTIONS:
            _load(cluster, writer, page_server, transactions - TRANSACTIONS)
        ingest = _load(cluster, writer, page_server, TRANSACTIONS)
        with writer.connect() as connection:
            row = connection.execute("select sum(pg_database_size(oid))::bigint from pg_database").fetchone()
        assert row is not None
        writer.stop_cleanly()
        _settled(page_server)
        read = [
            page_load(
                cluster, page_server, database.accounts, "--warm-up", blocks=PAGES_READ, depth=32, seconds=SECONDS
            ).server_cpu_us
            for _ in range(ROUNDS)
        ]
        before = Reads.of(page_server)
        page_load(cluster, page_server, database.accounts, blocks=PAGES_READ, depth=32, seconds=SECONDS)
        reads = Reads.of(page_server).since(before)
        memory = resident_kib(page_server.process.pid) * 1024
        start = _start_seconds(cluster)
        objects = _size(list(cluster.objects.rglob("*")))
        grown = Grown(
            reads.layers, reads.blocks, reads.values, sorted(read)[ROUNDS // 2], ingest, start, objects, int(row[0]),
            memory,
        )  # fmt: skip
        print(f"  {database.bytes / 1e6:.0f} MB, {transactions} transactions: {grown}", flush=True)
        return grown


def measure() -> list[Row]:
    """Once, with ten times the data, and with ten times the history."""
    with ExitStack() as stack:
        small = stack.enter_context(pgbench_database(SCALE))
        once = measure_one(small, TRANSACTIONS)
        history = measure_one(small, TRANSACTIONS * TIMES)
    with pgbench_database(SCALE * TIMES) as large:
        data = measure_one(large, TRANSACTIONS)
    rows: list[Row] = []
    for name, words, grown in (("data", f"{TIMES}x data", data), ("history", f"{TIMES}x history", history)):
        for suffix, what, unit, ours, reference, goal in (
            ("layers", "layers visited per GetPage", "", grown.layers, once.layers, 1.05),
            ("blocks", "blocks of layer files per GetPage", "", grown.blocks, once.blocks, 1.05),
            ("cpu", "CPU per GetPage", "us", grown.read_cpu_us, once.read_cpu_us, 1.15),
            ("ingest", "CPU of ingest per KiB of WAL", "us", grown.ingest_cpu_us_per_kib, once.ingest_cpu_us_per_kib, 1.15),
            ("start", "cold start", "s", grown.start_seconds, once.start_seconds, 1.15),
        ):  # fmt: skip
            rows.append(
                compare(f"P14-{name}-{suffix}", f"{what}, {words} ÷ once", unit, [(ours, reference)], goal, "lower")
            )
    gib = data.logical_bytes / (1 << 30)
    sizes = [(float(history.object_bytes), float(history.logical_bytes))]
    what = f"bytes in object storage ÷ logical size, after {TRANSACTIONS * TIMES:,} transactions"
    rows += [
        compare("S-amplification", what, "B", sizes, None, "lower"),
        fact("S-memory", "memory of a page server, caches included, for each GiB held", "MiB", data.memory_bytes / 2**20 / gib),
    ]  # fmt: skip
    return rows
