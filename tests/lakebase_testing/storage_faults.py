"""Object storage that is away, or takes requests and does not answer them, for a while.

A directory is exchanged for a plain file by one system call: at no moment does an object only seem to be missing, which
would mean that it is lost. An S3 server is killed, or stands still; one that this run did not start is left alone.
"""

import ctypes
import errno
import os
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lakebase_testing import procfs
from lakebase_testing.cluster import LocalCluster
from lakebase_testing.s3 import SCRIPT, own_s3
from lakebase_testing.waiting import wait_for

Outage = Literal["away", "silent"]
# linux/fcntl.h, linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def storage_outage(cluster: LocalCluster, kind: Outage) -> Generator[None]:
    """Within the block no request to the cluster's object storage succeeds.

    Raises: AssertionError for what there cannot be: a directory that is silent, a foreign S3 server.
    """
    assert cluster.page_service is not None
    if cluster.page_service.object_storage == "file":
        assert kind == "away", "a directory answers or it does not"
        with _plain_file_instead(cluster.directory / "objects"):
            yield
        return
    server = own_s3()
    assert server is not None, "the S3 server is not this run's"
    pid = int((server / "pid").read_text())
    if kind == "silent":
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)
        return
    os.kill(pid, signal.SIGKILL)
    wait_for("the end of the S3 server", lambda: procfs.state(pid) in (None, "Z"))
    try:
        yield
    finally:
        environment = {**os.environ, "LAKEBASE_S3_PORT": (server / "port").read_text().strip()}
        command = [str(SCRIPT), "start", str(server)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
        assert result.returncode == 0, f"{SCRIPT}: {result.stdout}{result.stderr}"


@contextmanager
def _plain_file_instead(directory: Path) -> Generator[None]:
    """Every call on a path below the directory fails with ENOTDIR."""
    other = directory.with_name(f"{directory.name}.away")
    other.touch()
    _exchange(directory, other)
    try:
        yield
    finally:
        _exchange(directory, other)
        other.unlink()


def _exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"renameat2: {errno.errorcode.get(number)}", str(one))
