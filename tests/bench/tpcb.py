"""P4 and P5: TPC-B against stock PostgreSQL with local fsync, and WAL bytes per transaction right after a checkpoint."""

from contextlib import ExitStack

import psycopg

from bench.report import Row, compare
from bench.servers import Stock, initialise, lakebase, pgbench
from lakebase_testing.postgres import parse_lsn

ROUNDS = 4
SECONDS = 12
SCALE = 50
CLIENTS = 16
# So few that after a checkpoint nearly every page is touched for the first time.
TRANSACTIONS_AFTER_CHECKPOINT = 500


def _wal_position(port: int) -> int:
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True) as connection:
        row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return parse_lsn(row[0])


def _wal_bytes_per_transaction(port: int) -> float:
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True) as connection:
        connection.execute("checkpoint")
    before = _wal_position(port)
    done = pgbench(
        port, "--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=2",
        f"--transactions={TRANSACTIONS_AFTER_CHECKPOINT // CLIENTS}",
    )  # fmt: skip
    return (_wal_position(port) - before) / done.transactions


def measure() -> list[Row]:
    """Alternates both servers."""
    rate: list[tuple[float, float]] = []
    volume: list[tuple[float, float]] = []
    with ExitStack() as stack:
        stock = Stock(quorum=False)
        stock.start(stack)
        _, writer = lakebase(stack)
        ports = (writer.port, stock.port)
        initialise(ports, SCALE)
        arguments = ["--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=2", f"--time={SECONDS}"]
        for port in ports:
            pgbench(port, *arguments)
        for number in range(ROUNDS):
            ours, reference = (pgbench(port, *arguments) for port in ports)
            rate.append((ours.tps, reference.tps))
            print(f"  round {number + 1}: {ours.tps:.0f} / {reference.tps:.0f} tps", flush=True)
        for number in range(ROUNDS):
            pair = tuple(_wal_bytes_per_transaction(port) for port in ports)
            volume.append((pair[0], pair[1]))
            print(f"  round {number + 1}: {pair[0]:.0f} / {pair[1]:.0f} WAL bytes per transaction", flush=True)
    return [
        compare("P4", f"TPC-B, {CLIENTS} clients ÷ stock with local fsync", "tps", rate, 0.95, "higher"),
        compare("P5", "WAL bytes per TPC-B transaction ÷ stock after a checkpoint", "B", volume, 0.1, "lower"),
    ]
