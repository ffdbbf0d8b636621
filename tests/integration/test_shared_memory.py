"""Shared memory outlives the processes that made it: what a killed PostgreSQL had must not pile up on the machine."""

import os
import re
import signal
from pathlib import Path

import pytest

from lakebase_testing import procfs
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.waiting import wait_for

# Where glibc's shm_open puts POSIX shared memory.
_POSIX = Path("/dev/shm")


def system_v() -> set[tuple[int, int]]:
    """Key and number of every System V segment in this IPC namespace."""
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return {(int(row[0]) & 0xFFFFFFFF, int(row[1])) for row in rows}


def maps_of(writer: Writer) -> str:
    """What the processes of a writer's PostgreSQL have mapped."""
    return "\n".join(Path(f"/proc/{pid}/maps").read_text() for pid in writer.postgres_pids())


def wait_recovered(writer: Writer, postmaster: int) -> None:
    """Waits until the agent runs another postmaster."""
    wait_for("another postmaster", lambda: writer.status()["postgres_pid"] not in (None, postmaster))
    writer.wait_running()


@pytest.mark.parametrize("isolation", ["auto", "process_tree"])
def test_a_killed_postgresql_leaves_no_shared_memory_behind(isolation: str) -> None:
    """Whoever is killed: the postmaster, upon which the agent kills the rest, or the agent with all that it runs.

    Once, each kill left a System V segment and some megabytes in /dev/shm, which nobody removed until the machine was restarted.
    """
    segments: set[tuple[int, int]] = set()
    files: set[str] = set()
    with LocalCluster(members=1) as cluster:
        cluster.expect_log("WARN.*signal 9", "WARN.*recovering from the safekeepers")
        writer = cluster.new_writer()
        section = f'[postgres]\nisolation = "{isolation}"\n'
        writer.config.write_text(writer.configuration().replace("[postgres]\n", section))
        writer.start()
        cluster.grant(writer)
        writer.wait_running()
        for victim in ("postmaster", "agent", "postmaster", "agent", "agent"):
            with writer.connect() as connection:
                connection.execute("set debug_parallel_query = on")
                connection.execute("select count(*) from pg_class")
                maps = maps_of(writer)
            segments |= {(int(key, 16), int(number)) for number, key in re.findall(r" (\d+) +/SYSV([0-9a-f]{8})", maps)}
            files |= set(re.findall(r"/dev/shm/(PostgreSQL\.\d+)", maps))
            if victim == "postmaster":
                postmaster = writer.status()["postgres_pid"]
                assert isinstance(postmaster, int)
                os.kill(postmaster, signal.SIGKILL)
                wait_recovered(writer, postmaster)
            else:
                pids = writer.postgres_pids()
                writer.process.kill()
                wait_for("the end of PostgreSQL", lambda pids=pids: not any(map(procfs.state, pids)))
                cluster.restart_writer(writer)
        writer.process.kill()
    assert len(segments) >= 3, "no segment was seen: nothing was compared"
    wait_for("the segments to be removed", lambda: not segments & system_v())
    assert not [name for name in files if (_POSIX / name).exists()]
