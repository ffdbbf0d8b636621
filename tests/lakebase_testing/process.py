"""One process of a test: started in a session of its own, ended by its id, its log kept and read."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lakebase_testing import procfs
from lakebase_testing.environment import is_root
from lakebase_testing.waiting import wait_for

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# Lines that no healthy run has; a test that provokes one says so with `expect_log`.
_SUSPICIOUS = re.compile(r"\b(WARN|ERROR|PANIC)\b|panicked at|SIGSEGV|terminated by signal")


@dataclass
class Process:
    """A program that can be started again and again; each start appends to the same log."""

    name: str
    command: Sequence[str]
    log: Path
    user: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    wrapper: Sequence[str] = ()
    _running: subprocess.Popen[bytes] | None = None
    _starver: "_Starver | None" = None

    @property
    def pid(self) -> int:
        """The id of the process itself, not of a wrapper that replaced itself by it."""
        assert self._running is not None, f"{self.name} was never started"
        return self._running.pid

    @property
    def is_running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._running is not None and self._running.poll() is None

    def start(self) -> None:
        """Starts the process."""
        assert not self.is_running, f"{self.name} runs already"
        change_user = self.user is not None and is_root()
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(
                [*self.wrapper, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment},
                user=self.user if change_user else None,
                group=self.user if change_user else None,
                extra_groups=[] if change_user else None,
            )

    def tree(self) -> list[int]:
        """Returns the process and everything below it."""
        return [self.pid, *procfs.descendants(self.pid)]

    def kill(self) -> int:
        """Kills the process at once (SIGKILL) and waits for it; returns its exit status."""
        return self._end(signal.SIGKILL, timeout_seconds=20)

    def stop(self, timeout_seconds: float = 60) -> int:
        """Asks the process to end (SIGTERM) and waits for it; returns its exit status."""
        return self._end(signal.SIGTERM, timeout_seconds)

    def wait_end(self, timeout_seconds: float = 60) -> int:
        """Waits until the process ends by itself; returns its exit status."""
        assert self._running is not None
        try:
            return self._running.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout_seconds:g} s") from None

    def _end(self, number: signal.Signals, timeout_seconds: float) -> int:
        self.feed()
        assert self._running is not None
        if self._running.poll() is None:
            self._running.send_signal(number)
        return self.wait_end(timeout_seconds)

    def freeze(self) -> None:
        """Stops the process (SIGSTOP) until `thaw`."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_for(f"{self.name} to freeze", lambda: procfs.state(self.pid) == "T")

    def thaw(self) -> None:
        """Lets a frozen process go on (SIGCONT)."""
        procfs.send_signal(self.pid, signal.SIGCONT)

    def freeze_tree(self) -> list[int]:
        """Freezes the process and everything below it; returns whom, for `thaw_all`."""
        return freeze_all(self.tree)

    def starve(self, share: float = 0.04) -> None:
        """Leaves the process and everything below it `share` of the time, in slices of 10 ms, until `feed`."""
        assert self._starver is None
        self._starver = _Starver(self.pid, share)

    def feed(self) -> None:
        """Ends the starvation, if there is one."""
        if self._starver is not None:
            self._starver.end()
            self._starver = None

    def log_text(self) -> str:
        """Returns the log without colours."""
        return _ANSI.sub("", self.log.read_text(errors="replace")) if self.log.exists() else ""

    def suspicious_lines(self, expected: Sequence[re.Pattern[str]]) -> list[str]:
        """Returns the log lines that report trouble which no pattern in `expected` foresees."""
        return [
            line
            for line in self.log_text().splitlines()
            if _SUSPICIOUS.search(line) and not any(pattern.search(line) for pattern in expected)
        ]


def freeze_all(tree: Callable[[], list[int]]) -> list[int]:
    """Freezes all processes that `tree` returns, repeatedly, since they may fork meanwhile; returns whom."""
    frozen: list[int] = []
    while True:
        fresh = [pid for pid in tree() if pid not in frozen]
        if not fresh:
            return frozen
        frozen.extend(pid for pid in fresh if procfs.send_signal(pid, signal.SIGSTOP))


def thaw_all(pids: Sequence[int]) -> None:
    """Lets frozen processes go on; children first, so that a parent finds them running."""
    for pid in reversed(pids):
        procfs.send_signal(pid, signal.SIGCONT)


class _Starver:
    """A thread that freezes and thaws a tree of processes, so that it gets a share of the time only."""

    _RUN_SECONDS = 0.010

    def __init__(self, pid: int, share: float) -> None:
        self._pid = pid
        self._pause_seconds = self._RUN_SECONDS * (1 - share) / share
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"starve-{pid}", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Thaws the tree for good."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            frozen = freeze_all(lambda: [self._pid, *procfs.descendants(self._pid)])
            self._ended.wait(self._pause_seconds)
            thaw_all(frozen)
            time.sleep(self._RUN_SECONDS)
