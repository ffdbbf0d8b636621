"""P2, P3 and CPU per commit: one-statement commits against stock PostgreSQL with `ANY 2` of three pg_receivewal."""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.report import Row, compare
from bench.servers import Stock, lakebase, pgbench
from lakebase_testing.environment import scratch

ROUNDS = 3
SECONDS = 8
# A commit and nothing else: 100 bytes of WAL, no page is touched.
STATEMENT = f"select pg_logical_emit_message(true, 'bench', '{'x' * 100}');\n"


def _cpu_seconds(pids: Sequence[int]) -> float:
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure() -> list[Row]:
    """Alternates both servers for 1, 16 and 64 clients."""
    latency: list[tuple[float, float]] = []
    rate: dict[int, list[tuple[float, float]]] = {16: [], 64: []}
    cpu: list[tuple[float, float]] = []
    with ExitStack() as stack:
        directory = scratch("script")
        stack.callback(shutil.rmtree, directory)
        script = directory / "commit.sql"
        script.write_text(STATEMENT)
        arguments = ["--no-vacuum", "--protocol=prepared", f"--file={script}", f"--time={SECONDS}"]
        stock = Stock(quorum=True)
        stock.start(stack)
        cluster, writer = lakebase(stack)
        helpers = [writer.process.pid, *(safekeeper.process.pid for safekeeper in cluster.safekeepers)]
        ports = (writer.port, stock.port)
        for port in ports:
            pgbench(port, *arguments, "--client=4")
        for number in range(ROUNDS):
            ours, reference = (pgbench(port, *arguments, "--client=1", log_latency=True) for port in ports)
            assert ours.p50_ms is not None
            assert reference.p50_ms is not None
            latency.append((ours.p50_ms, reference.p50_ms))
            print(f"  round {number + 1}: p50 {ours.p50_ms:.3f} / {reference.p50_ms:.3f} ms", flush=True)
            for clients, figures in rate.items():
                pair: list[float] = []
                spent: list[float] = []
                for port, pids in ((writer.port, helpers), (stock.port, stock.followers())):
                    before = _cpu_seconds(pids)
                    result = pgbench(port, *arguments, f"--client={clients}", "--jobs=2")
                    pair.append(result.tps)
                    spent.append((_cpu_seconds(pids) - before) / result.transactions * 1e6)
                figures.append((pair[0], pair[1]))
                if clients == 16:
                    cpu.append((spent[0], spent[1]))
                print(
                    f"  round {number + 1}: {clients} clients {pair[0]:.0f} / {pair[1]:.0f} commits/s, "
                    f"CPU {spent[0]:.0f} / {spent[1]:.0f} us per commit",
                    flush=True,
                )
    return [
        compare("P2", "one-statement commit p50, 1 client ÷ stock ANY 2 of 3", "ms", latency, 0.6, "lower"),
        compare("P3-16", "commits/s, 16 clients ÷ stock ANY 2 of 3", "1/s", rate[16], 2.0, "higher"),
        compare("P3-64", "commits/s, 64 clients ÷ stock ANY 2 of 3", "1/s", rate[64], 2.0, "higher"),
        compare("C-16", "CPU of safekeepers and agent per commit ÷ receivers and walsenders", "us", cpu, None, "lower"),
    ]
