"""`python -m bench [P1 P2 ...]`: measures the rows named (all without a name), prints the table, writes build/bench/ID.json."""

import os
import sys
from collections.abc import Callable, Sequence

from bench import append, cold_start, commits, growth, idle, pages, recovery, tpcb, virtual_disk
from bench.report import Row, table
from lakebase_testing.postgres import remove_templates

# Which rows a part gives; parts share servers, so they run whole.
PARTS: dict[str, tuple[Sequence[str], Callable[[], list[Row]]]] = {
    "append": (("P1", "P1-tls"), append.measure),
    "commits": (("P2", "P3-16", "P3-64", "C-16"), commits.measure),
    "tpcb": (("P4", "P5"), tpcb.measure),
    "idle": (("M-1", "M-1000", "D-1000"), idle.measure),
    "memory": (("P6", "P6-tls", "P8", "P8-tls", "P8-wall", "P8-wall-tls"), pages.measure_memory),
    "disk": (("P7", "P7-values"), pages.measure_disk),
    "redo": (("P9",), recovery.measure_redo),
    "ingest": (("P10",), recovery.measure_ingest),
    "virtual_disk": (("P11", "P11-read", "P11-call"), virtual_disk.measure),
    "cold_start": (
        ("P12-200MB", "P12-1GB", "P12-5GB", "P12-tables", "P12-relation", "scan-cold", "select-cold"),
        cold_start.measure,
    ),
    "growth": (("P14-data", "P14-history", "S-amplification", "S-memory"), growth.measure),
}


def main(wanted: Sequence[str]) -> int:
    """Runs what was asked for; returns the exit status. A missed goal is a figure, not an error."""
    known = [row for rows, _ in PARTS.values() for row in rows]
    unknown = [name for name in wanted if not any(row == name or row.startswith(name + "-") for row in known)]
    if unknown:
        print(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores", flush=True)
    rows: list[Row] = []
    for name, (ids, measure) in PARTS.items():
        chosen = [row for row in ids if not wanted or any(row == one or row.startswith(one + "-") for one in wanted)]
        if not chosen:
            continue
        print(f"--- {name}: {' '.join(ids)}", flush=True)
        try:
            measured = measure()
        finally:
            remove_templates()
        for row in measured:
            row.save()
            rows.append(row)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
