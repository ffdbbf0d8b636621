"""What an idle log costs a safekeeper: memory, and segments on its disk."""

import uuid
from pathlib import Path

from bench.report import Row, fact
from lakebase_testing.admin import Json
from lakebase_testing.cluster import LocalCluster, Safekeeper

LOGS = 1000


def resident_kib(pid: int) -> float:
    """Memory of a process that is in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    raise AssertionError("no VmRSS in /proc")


def _create(safekeeper: Safekeeper, like: Json) -> None:
    path = f"/v1/logs/{uuid.uuid4()}/{uuid.uuid4()}"
    body = {
        key: like[key]
        for key in ("system_id", "segment_bytes", "start_lsn", "timeline", "max_full_xid", "configuration")
    }
    reply = safekeeper.admin.call("PUT", path, body)
    assert reply.status in (200, 201), f"PUT {path}: {reply.status} {reply.text}"


def measure() -> list[Row]:
    """Creates 1,000 logs beside the first; nothing is ever appended to any of them."""
    with LocalCluster(members=1, tls=False) as cluster:
        cluster.expect_log("TLS is off")
        safekeeper = cluster.safekeepers[0]
        one = resident_kib(safekeeper.process.pid)
        like = safekeeper.log_status()
        for _ in range(LOGS):
            _create(safekeeper, like)
        many = resident_kib(safekeeper.process.pid)
        segments = sum(1 for path in (safekeeper.data / "logs").rglob("wal/*") if path.is_file())
    return [
        fact("M-1", "resident memory of a safekeeper with 1 idle log", "KiB", one),
        fact("M-1000", "memory of each of 1,000 idle logs", "KiB", (many - one) / LOGS, goal=64),
        fact("D-1000", "segments on disk of 1,000 idle logs", "files", segments, goal=0),
    ]
