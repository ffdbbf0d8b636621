"""Faults that need more than a signal: no io_uring, a full disk, a disk that fails."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lakebase_testing.environment import is_root
from lakebase_testing.waiting import wait_for

# Halves of a disk until a page is left are some twenty.
_FILL_STEPS_MAX = 1000
_PAGE_BYTES = 4096


def without_io_uring() -> list[str]:
    """Returns a wrapper under which `io_uring_setup` fails as container runtimes make it fail (seccomp, EPERM)."""
    return [sys.executable, str(Path(__file__).with_name("forbid_io_uring.py"))]


def failing_call(call: str, error: str, when: str, log: Path) -> list[str]:
    """Returns a wrapper under which a system call fails: `when` counts as strace does (`3`, `100+`, `10..12`).

    The ring of io_uring makes no such call: use it together with `without_io_uring`.
    """
    return [
        "strace", "--follow-forks", "--seccomp-bpf", "-qq", "--daemonize=grandchild", f"--output={log}", f"--trace={call}",
        f"--inject={call}:error={error}:when={when}",
    ]  # fmt: skip


class SmallDisk:
    """A file system of a fixed size that can be filled and emptied: a tmpfs, in a mount namespace for ordinary users.

    `wrapper` goes before a command that shall see it; `path` is how this process reaches it.
    """

    def __init__(self, mount_point: Path, size_mib: int) -> None:
        self.mount_point = mount_point
        self._size_mib = size_mib
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.mount_point.mkdir(exist_ok=True)
        mount = f"mount -t tmpfs -o size={self._size_mib}m,mode=777 tmpfs '{self.mount_point}' && exec sleep infinity"
        namespaces = ["--mount"] if is_root() else ["--user", "--map-root-user", "--mount"]
        self._holder = subprocess.Popen(["unshare", *namespaces, "sh", "-c", mount], start_new_session=True)
        wait_for("the small disk", self._mounted, 10)
        return self

    def _mounted(self) -> bool:
        assert self._holder is not None
        assert self._holder.poll() is None, "no mount namespace: this machine forbids them"
        return os.path.ismount(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._holder is not None
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()

    @property
    def path(self) -> Path:
        """The disk as seen from here."""
        assert self._holder is not None
        return Path(f"/proc/{self._holder.pid}/root{self.mount_point}")

    @property
    def wrapper(self) -> Sequence[str]:
        """Puts a command into the namespace of the disk; the process keeps its id."""
        assert self._holder is not None
        user = [] if is_root() else ["--user", "--preserve-credentials"]
        return ["nsenter", f"--target={self._holder.pid}", *user, "--mount", "--"]

    def fill(self, leave_bytes: int = 0) -> None:
        """Takes all free space but `leave_bytes`; others may take or give back some meanwhile."""
        with (self.path / "ballast").open("ab") as file:
            for _ in range(_FILL_STEPS_MAX):
                free = shutil.disk_usage(self.path).free - leave_bytes
                if free < _PAGE_BYTES:
                    return
                # In pieces: whoever takes a little meanwhile must not make all of it fail.
                size = max(free // 2, _PAGE_BYTES)
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        raise AssertionError(f"the disk at {self.mount_point} cannot be filled: its free space does not hold still")

    def empty(self) -> None:
        """Gives the space back."""
        (self.path / "ballast").unlink()


class FailingDisk:
    """An ext4 file system whose block device begins to answer EIO: for root, on machines with loop devices.

    `fail` makes the device smaller than the file system on it: the kernel answers every access behind its new end with an
    I/O error, whatever kind of I/O was used. What was stored there is gone.
    """

    _SIZE_MIB = 512

    def __init__(self, mount_point: Path) -> None:
        self.mount_point = mount_point
        self._backing = mount_point.with_name(f"{mount_point.name}.backing")
        self._device = ""

    @staticmethod
    def unavailable() -> str | None:
        """Why there can be none here, or None."""
        if not is_root():
            return "needs root"
        if shutil.which("mkfs.ext4") is None:
            return "needs mkfs.ext4"
        found = subprocess.run(["losetup", "--find"], capture_output=True, text=True, check=False)
        return None if found.returncode == 0 else f"needs loop devices: {found.stderr.strip()}"

    def __enter__(self) -> Self:
        self.mount_point.mkdir(exist_ok=True)
        self._run("truncate", f"--size={self._SIZE_MIB}M", str(self._backing))
        # Without a journal the file system stays mounted for writing when its device fails.
        self._run("mkfs.ext4", "-q", "-O", "^has_journal", str(self._backing))
        self._device = self._run("losetup", "--find", "--show", str(self._backing)).strip()
        self._run("mount", "-o", "errors=continue", self._device, str(self.mount_point))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run("umount", str(self.mount_point))
        self._run("losetup", "--detach", self._device)
        self._backing.unlink()

    def fail(self) -> None:
        """From here on the device knows its first megabyte only."""
        self._run("truncate", "--size=1M", str(self._backing))
        self._run("losetup", "--set-capacity", self._device)

    @staticmethod
    def _run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
