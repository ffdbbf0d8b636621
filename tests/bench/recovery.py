"""P9 and P10: redo on pages in memory, and a page server that catches up, against PostgreSQL's own recovery."""

import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.append import cpu_seconds
from bench.databases import QUIET, Database, pgbench_database
from bench.pages import pageserver_cluster
from bench.report import Row, compare
from bench.servers import pgbench
from lakebase_testing import procfs
from lakebase_testing.cluster import lsn_of
from lakebase_testing.environment import environment, scratch
from lakebase_testing.postgres import StockServer, run_as_postgres
from lakebase_testing.waiting import wait_for

ROUNDS = 3
SCALE = 10
# 90 MB of WAL: 80 changes for each page that is read, so that reading pages is the smaller part.
TRANSACTIONS = 200_000
# For the page server less, as the writer commits each at a quorum.
TRANSACTIONS_INGESTED = 40_000
# As the engine runs its writers: redo has every change as a record.
STOCK = {**QUIET, "full_page_writes": "off", "wal_init_zero": "on"}


@dataclass(frozen=True)
class Crashed:
    """A server that was ended under load, as of a checkpoint that wrote everything."""

    data: Path
    redo: str


@dataclass(frozen=True)
class Recovered:
    """One recovery: CPU seconds of the process that replays, and how much it replayed."""

    cpu_seconds: float
    megabytes: float


def _run(port: int, transactions: int) -> None:
    pgbench(port, "--no-vacuum", "--protocol=prepared", "--client=4", "--jobs=2", f"--transactions={transactions // 4}")


def crash(database: Database, directory: Path, transactions: int) -> Crashed:
    """Runs the load and ends the server without a checkpoint."""
    server = StockServer.create(directory, database.data, settings=STOCK)
    server.start()
    _run(server.port, transactions)
    os.kill(server.process.pid, signal.SIGQUIT)
    server.process.wait_end()
    wait_for("the end of all backends", lambda: not procfs.users_of(directory, frozenset({"postgres"})), 30)
    control = run_as_postgres("pg_controldata", str(server.data)).stdout
    redo = re.search(r"REDO location:\s+(\S+)", control)
    assert redo is not None, control
    assert "in production" in control, control
    return Crashed(server.data, redo.group(1))


def stock_recovery(crashed: Crashed) -> Recovered:
    """Lets PostgreSQL recover a copy; its log says what the startup process spent."""
    directory = scratch("recovery")
    try:
        server = StockServer.create(directory, crashed.data, settings=STOCK)
        server.start(timeout_seconds=300)
        server.stop()
        log = server.process.log_text()
    finally:
        shutil.rmtree(directory)
    begun = re.search(r"redo starts at (\S+)", log)
    done = re.search(r"redo done at (\S+) system usage: CPU: user: ([\d.]+) s, system: ([\d.]+) s, elapsed", log)
    assert begun is not None, log
    assert done is not None, log
    distance = _lsn(done.group(1)) - _lsn(begun.group(1))
    return Recovered(float(done.group(2)) + float(done.group(3)), distance / 1e6)


def _lsn(text: str) -> int:
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def measure_redo() -> list[Row]:
    """P9: the same WAL, replayed by PostgreSQL and by ours."""
    rates: list[tuple[float, float]] = []
    with ExitStack() as stack:
        database = stack.enter_context(pgbench_database(SCALE, ("select pg_switch_wal()", "checkpoint")))
        directory = scratch("crash")
        stack.callback(shutil.rmtree, directory)
        crashed = crash(database, directory, TRANSACTIONS)
        for number in range(ROUNDS):
            stock = stock_recovery(crashed)
            result = subprocess.run(
                [str(environment().bin / "redo-load"), "--pgdata", str(crashed.data), "--from", crashed.redo],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert result.returncode == 0, f"redo-load: {result.stdout}{result.stderr}"
            ours: dict[str, float] = json.loads(result.stdout)
            assert ours["wal_bytes"] / 1e6 >= stock.megabytes, f"{ours} is less than PostgreSQL replayed: {stock}"
            rates.append((ours["records"] / ours["cpu_seconds"], ours["records"] / stock.cpu_seconds))
            print(
                f"  round {number + 1}: {ours['records']:.0f} records, {stock.megabytes:.0f} MB: "
                f"{ours['cpu_seconds']:.2f} / {stock.cpu_seconds:.2f} s CPU",
                flush=True,
            )
    return [compare("P9", "redo records/s per core ÷ stock recovery of the same WAL", "1/s", rates, 2.0, "higher")]


def measure_ingest() -> list[Row]:
    """P10: a page server that was away catches up with the same load, as PostgreSQL recovers from it."""
    rates: list[tuple[float, float]] = []
    with ExitStack() as stack:
        database = stack.enter_context(pgbench_database(SCALE))
        directory = scratch("crash")
        stack.callback(shutil.rmtree, directory)
        crashed = crash(database, directory, TRANSACTIONS_INGESTED)
        cluster = stack.enter_context(pageserver_cluster(database, tls=False))
        page_server = cluster.page_servers[0]
        writer = cluster.start_writer({"shared_buffers": "1GB", "autovacuum": "off", "jit": "off"})
        # While the page server is away nothing may have to be read from it.
        with writer.connect() as connection:
            connection.execute("create extension pg_prewarm")
            connection.execute("select pg_prewarm(oid) from pg_class where relkind in ('r', 'i', 't', 'S')")
        pgbench(writer.port, "--no-vacuum", "--protocol=prepared", "--transactions=1000")
        for number in range(ROUNDS):
            stock = stock_recovery(crashed)
            page_server.freeze()
            begin = lsn_of(page_server.status()["durable_lsn"])
            page_server.kill()
            _run(writer.port, TRANSACTIONS_INGESTED)
            end = cluster.wait_caught_up()
            page_server.start()
            page_server.wait_ready()
            wait_for(
                "the page server to catch up",
                lambda end=end: lsn_of(page_server.status()["ingested_lsn"]) >= end,
                120,
            )
            cpu = cpu_seconds(page_server.process.pid)
            megabytes = (end - begin) / 1e6
            rates.append((megabytes / cpu, stock.megabytes / stock.cpu_seconds))
            print(
                f"  round {number + 1}: {megabytes:.0f} MB in {cpu:.2f} s CPU / {stock.megabytes:.0f} MB in "
                f"{stock.cpu_seconds:.2f} s CPU",
                flush=True,
            )
    return [
        compare("P10", "ingest MB/s per core ÷ stock recovery of the same load", "MB/s", rates, 3.0, "higher"),
    ]
