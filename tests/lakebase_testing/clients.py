"""Clients that remember what was acknowledged to them.

A client's memory is the judge of every durability test: an id counts as acknowledged only after COMMIT came back over
the wire, and an id whose outcome is unknown is never used again.
"""

import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from lakebase_testing.environment import environment
from lakebase_testing.postgres import Connection

# A client that lost its server tries again after this.
_RETRY_SECONDS = 0.05


@dataclass(frozen=True)
class Acknowledgement:
    """One commit that came back."""

    id: int
    sent_at: float
    received_at: float


def create_table(connection: Connection) -> None:
    """Makes the table that `Inserters` write to."""
    connection.execute("create table acknowledged (id bigint primary key, note text not null)")


class Inserters:
    """Threads that insert ids one by one, each in a transaction of its own, and follow the writer wherever it goes.

    `target` returns the connection string of the present writer, or None while there is none. Times are CLOCK_MONOTONIC.
    """

    def __init__(self, target: Callable[[], str | None], threads: int = 4) -> None:
        self._target = target
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._next = 0
        self._acknowledged: list[Acknowledgement] = []
        self._connections: dict[int, Connection] = {}
        self._failures: list[BaseException] = []
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"inserter-{number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> "Inserters":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stops all threads; a commit under way may still be acknowledged.

        Raises: AssertionError when a client met what no fault explains (a duplicate id, a statement error).
        """
        self._ended.set()
        deadline = time.monotonic() + 3
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.1))
        self.drop_connections()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} hangs"
        assert not self._failures, f"clients met: {self._failures}"

    def acknowledged(self) -> list[Acknowledgement]:
        """Returns everything acknowledged until now, in the order of arrival."""
        with self._lock:
            return list(self._acknowledged)

    def ids(self) -> set[int]:
        """Returns the acknowledged ids."""
        return {acknowledgement.id for acknowledgement in self.acknowledged()}

    def count(self) -> int:
        """How many ids were acknowledged."""
        with self._lock:
            return len(self._acknowledged)

    def drop_connections(self) -> None:
        """Cuts all connections: what a Service does with those to a writer that was replaced."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            try:
                with socket.socket(fileno=os.dup(connection.fileno())) as wire:
                    wire.shutdown(socket.SHUT_RDWR)
            except (OSError, psycopg.OperationalError):
                continue  # It was closed meanwhile.

    def _run(self, number: int) -> None:
        while not self._ended.is_set():
            dsn = self._target()
            if dsn is None:
                self._ended.wait(_RETRY_SECONDS)
                continue
            try:
                with psycopg.connect(dsn, autocommit=True) as connection:
                    with self._lock:
                        self._connections[number] = connection
                    while not self._ended.is_set():
                        self._insert(connection)
            # A server that goes away is what these clients are made for.
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                with self._lock:
                    self.errors.append(str(error).strip())
                self._ended.wait(_RETRY_SECONDS)
            # Everything else would be a broken promise: it fails the test in `end`.
            except psycopg.Error as error:
                self._failures.append(error)
                return
            finally:
                with self._lock:
                    self._connections.pop(number, None)

    def _insert(self, connection: Connection) -> None:
        with self._lock:
            self._next += 1
            number = self._next
        sent_at = time.monotonic()
        connection.execute("insert into acknowledged values (%s, %s)", (number, f"note {number}"), prepare=True)
        received_at = time.monotonic()
        with self._lock:
            self._acknowledged.append(Acknowledgement(number, sent_at, received_at))


def longest_gap(acknowledgements: Sequence[Acknowledgement], start: float, end: float) -> float:
    """Returns the longest time without any acknowledgement within `[start, end)`, in seconds."""
    moments = [start, *sorted(a.received_at for a in acknowledgements if start <= a.received_at < end), end]
    return max(later - earlier for earlier, later in itertools.pairwise(moments))


def stored_ids(connection: Connection) -> set[int]:
    """Returns the ids that a server holds."""
    return {row[0] for row in connection.execute("select id from acknowledged").fetchall()}


class Pgbench:
    """pgbench (TPC-B) in the background, started again whenever its server went away."""

    def __init__(self, target: Callable[[], str | None], log: Path, clients: int = 4) -> None:
        self._target = target
        self._log = log
        self._clients = clients
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="pgbench", daemon=True)
        self.runs = 0

    @staticmethod
    def initialise(dsn: str, scale: int = 5) -> None:
        """Makes pgbench's tables."""
        command = [str(environment().postgres_bin / "pgbench"), "--initialize", "--quiet", f"--scale={scale}", dsn]
        subprocess.run(command, check=True, capture_output=True)

    def __enter__(self) -> "Pgbench":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stops it."""
        self._ended.set()
        self.restart()
        self._thread.join(20)
        assert not self._thread.is_alive(), "pgbench hangs"

    def restart(self) -> None:
        """Ends the present run, as when its connections are cut; the next goes to the present writer."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL)

    def _run(self) -> None:
        while not self._ended.is_set():
            dsn = self._target()
            if dsn is None:
                self._ended.wait(_RETRY_SECONDS)
                continue
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [
                        str(environment().postgres_bin / "pgbench"), f"--client={self._clients}", "--jobs=1",
                        "--time=3600", "--no-vacuum", dsn,
                    ],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self.runs += 1
                if self._ended.is_set():
                    self._process.kill()
                self._process.wait()
            self._ended.wait(_RETRY_SECONDS)


def tpcb_sums(connection: Connection) -> set[int]:
    """Returns the four sums of pgbench's tables; a consistent database has one value."""
    row = connection.execute(
        "select (select coalesce(sum(abalance), 0) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),"
        " (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)"
    ).fetchone()
    assert row is not None
    return {int(value) for value in row}


class Auditor:
    """A thread that adds up pgbench's tables again and again, which reads every page: under load, too, all sums are equal."""

    # Between two audits, so that others get their share of the machine.
    _PAUSE_SECONDS = 0.5

    def __init__(self, target: Callable[[], str | None]) -> None:
        self._target = target
        self._ended = threading.Event()
        self._failures: list[str] = []
        self.audits = 0
        self._thread = threading.Thread(target=self._run, name="auditor", daemon=True)

    def __enter__(self) -> "Auditor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stops the thread after the audit that it makes.

        Raises: AssertionError when an audit failed.
        """
        self._ended.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "the auditor hangs"
        assert not self._failures, f"audits failed: {self._failures}"

    def _run(self) -> None:
        while not self._ended.wait(self._PAUSE_SECONDS):
            dsn = self._target()
            if dsn is None:
                continue
            try:
                with psycopg.connect(dsn, autocommit=True) as connection:
                    sums = tpcb_sums(connection)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                continue  # The server went away, as it may.
            except psycopg.Error as error:
                self._failures.append(repr(error))
                return
            self.audits += 1
            if len(sums) != 1:
                self._failures.append(f"sums of one snapshot differ: {sums}")
