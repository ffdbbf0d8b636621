"""The faults of the harness are real: a test that relies on an imagined fault proves nothing."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lakebase_testing import procfs
from lakebase_testing.clients import Acknowledgement, longest_gap
from lakebase_testing.environment import scratch
from lakebase_testing.faults import FailingDisk, SmallDisk, failing_call, without_io_uring
from lakebase_testing.postgres import StockServer, base_backup, format_lsn, parse_lsn, segment_name
from lakebase_testing.process import Process
from lakebase_testing.waiting import hold, wait_for

PROBE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
parameters = (ctypes.c_ubyte * 120)()
result = libc.syscall(425, 4, parameters)
print(result if result >= 0 else -ctypes.get_errno())
"""


def test_io_uring_is_forbidden_under_its_wrapper() -> None:
    """As container runtimes do: EPERM, and everything else works."""
    result = subprocess.run(
        [*without_io_uring(), sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) == -errno.EPERM


def test_an_injected_failure_is_seen_by_the_program(tmp_path: Path) -> None:
    """The third fdatasync fails with EIO, the second does not; the process keeps its id."""
    program = (
        "import os\nfile = os.open('x', os.O_CREAT | os.O_RDWR)\nfor _ in range(2): os.fdatasync(file)\n"
        "try: os.fdatasync(file)\nexcept OSError as error: print(os.getpid(), error.errno)"
    )
    wrapper = failing_call("fdatasync", "EIO", "3", tmp_path / "strace")
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    output, _ = process.communicate(timeout=30)
    assert output.split() == [str(process.pid), str(errno.EIO)]


def test_a_small_disk_gets_full_and_empty() -> None:
    """Inside its namespace writes fail with ENOSPC until the ballast goes."""
    directory = scratch("disk")
    with SmallDisk(directory / "small", 8) as disk:
        write = [*disk.wrapper, "dd", "if=/dev/zero", f"of={disk.mount_point}/file", "bs=1M", "count=2", "conv=fsync"]
        disk.fill()
        full = subprocess.run(write, capture_output=True, text=True, check=False)
        assert "No space left" in full.stderr
        disk.empty()
        subprocess.run(write, capture_output=True, check=True)
    assert list((directory / "small").iterdir()) == [], "the disk was mounted for everyone"
    (directory / "small").rmdir()
    directory.rmdir()


def test_a_failing_disk_answers_eio() -> None:
    """Written and synced before, an I/O error afterwards, to direct I/O, too."""
    if reason := FailingDisk.unavailable():
        pytest.skip(reason)
    directory = scratch("disk")
    with FailingDisk(directory / "failing") as disk:
        write = [
            "dd",
            "if=/dev/zero",
            f"of={disk.mount_point}/file",
            "bs=1M",
            "count=64",
            "oflag=direct",
            "conv=notrunc,fsync",
        ]
        subprocess.run(write, capture_output=True, check=True)
        disk.fail()
        failed = subprocess.run(write, capture_output=True, text=True, check=False)
        assert "Input/output error" in failed.stderr
    (directory / "failing").rmdir()
    directory.rmdir()


def spinner(directory: Path) -> Process:
    """A process that uses all the time it gets."""
    return Process("spinner", [sys.executable, "-c", "while True: pass"], directory / "log")


def used_seconds(pid: int) -> float:
    """Time that a process got."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_starved_process_gets_little_time(tmp_path: Path) -> None:
    """A few percent, and all of it again afterwards."""
    process = spinner(tmp_path)
    process.start()
    wait_for("the start", lambda: used_seconds(process.pid) > 0.1)
    process.starve(share=0.05)
    before = used_seconds(process.pid)
    hold(1)
    starved = used_seconds(process.pid) - before
    process.feed()
    wait_for("time after the starvation", lambda: used_seconds(process.pid) > before + starved + 0.2)
    process.kill()
    assert starved < 0.3


def test_a_frozen_process_stands_still(tmp_path: Path) -> None:
    """State T until it is thawed; a kill ends it anyway."""
    process = spinner(tmp_path)
    process.start()
    process.freeze()
    before = used_seconds(process.pid)
    hold(0.2)
    assert used_seconds(process.pid) == before
    process.thaw()
    wait_for("the thaw", lambda: procfs.state(process.pid) in ("R", "S"))
    assert process.kill() == -signal.SIGKILL


def test_suspicious_lines_are_found_unless_announced(tmp_path: Path) -> None:
    """The log of each process is judged at the end of each test."""
    process = Process(
        "talker", ["printf", "INFO fine\\n\\033[33mWARN\\033[0m odd\\nthread panicked at x\\n"], tmp_path / "log"
    )
    process.start()
    process.wait_end()
    assert process.suspicious_lines([]) == ["WARN odd", "thread panicked at x"]


def test_gaps_count_from_the_start_to_the_end() -> None:
    """A stall that lasts until the end of the observation is a gap, too."""
    at = [Acknowledgement(number, 0, moment) for number, moment in enumerate((1.0, 1.5, 9.0))]
    assert longest_gap(at, 0.9, 4.0) == pytest.approx(2.5)


def test_positions_and_segment_names_are_postgresqls() -> None:
    """Against the server's own functions."""
    assert parse_lsn("16/B374D848") == 0x16B374D848
    directory = scratch("stock")
    server = StockServer.create(directory, base_backup(64))
    server.start()
    with server.connect() as connection:
        row = connection.execute(
            "select pg_current_wal_insert_lsn()::text, pg_walfile_name(pg_current_wal_insert_lsn())"
        ).fetchone()
    server.stop()
    assert row is not None
    assert format_lsn(parse_lsn(row[0])) == row[0]
    assert segment_name(1, parse_lsn(row[0]), 64 << 20) == row[1]
    subprocess.run(["rm", "-rf", str(directory)], check=True)


def test_waiting_ends_with_the_reason() -> None:
    """A hanging condition names what was waited for."""
    began = time.monotonic()
    with pytest.raises(AssertionError, match="the impossible"):
        wait_for("the impossible", lambda: False, 0.1)
    assert time.monotonic() - began < 5
