"""`python -m chaos.fenced_reads --repetitions N`: a fenced writer that thaws answers nobody.

A writer is frozen in the middle of executing queries (agent and PostgreSQL), and fenced. Its client drains what the
kernel still holds, for more than a second and beyond the end of the lease. Then it thaws: half of the time PostgreSQL first,
with the agent still frozen. From then on not one byte may arrive, since its `send` would have begun after the lease ended.
"""

import argparse
import contextlib
import random
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence

from chaos.checks import Checks
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.postgres import remove_templates
from lakebase_testing.process import thaw_all
from lakebase_testing.waiting import hold, wait_for

# The lease is 1.5 s from the last renewal, which was before the freeze; the rest is room for the drain.
_FROZEN_SECONDS = 2.6
# How long after the thaw the client listens.
_LISTEN_SECONDS = 1.0
_CLIENTS = 4
# Queries sent ahead, so that every backend always has one to answer.
_PIPELINED = 200_000


class Reader:
    """A client on a bare socket that asks without end and notes when bytes arrive."""

    def __init__(self, writer: Writer) -> None:
        self._wire = socket.create_connection(("127.0.0.1", writer.port), timeout=10)
        parameters = b"user\0postgres\0database\0postgres\0\0"
        self._wire.sendall(struct.pack("!ii", 8 + len(parameters), 196_608) + parameters)
        self._wire.settimeout(None)
        self.arrivals: list[tuple[float, int]] = []
        self.closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._listen)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        # A fraction of a millisecond each: a freeze hits a backend that executes, or one that sends.
        query = b"select count(*) from generate_series(1, 2000)\0"
        message = b"Q" + struct.pack("!i", 4 + len(query)) + query
        try:
            for _ in range(_PIPELINED):
                self._wire.sendall(message)
        except OSError:
            return  # The server is gone: that is how each repetition ends.

    def _listen(self) -> None:
        try:
            while data := self._wire.recv(65_536):
                self.arrivals.append((time.clock_gettime(time.CLOCK_BOOTTIME), len(data)))
        except OSError:
            pass
        finally:
            self.closed.set()

    def bytes_between(self, start: float, end: float) -> int:
        """How many bytes arrived in `[start, end)`, times of CLOCK_BOOTTIME."""
        return sum(size for at, size in list(self.arrivals) if start <= at < end)

    def close(self) -> None:
        """Ends the client."""
        with contextlib.suppress(OSError):  # It may be closed already.
            self._wire.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._wire.close()


def now() -> float:
    """The clock of leases."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def repeat(cluster: LocalCluster, writer: Writer, source: random.Random, *, agent_first: bool) -> tuple[int, int]:
    """One repetition; returns bytes before the freeze and bytes after the thaw. The writer is gone afterwards."""
    readers = [Reader(writer) for _ in range(_CLIENTS)]
    try:
        wait_for("answers to flow", lambda: all(reader.arrivals for reader in readers))
        began = now()
        hold(source.uniform(0.2, 0.5))
        frozen = writer.process.freeze_tree()
        frozen_at = now()
        cluster.term += 1
        successor = cluster.new_writer()
        successor.term = cluster.term
        cluster.fence(successor.term, successor.id)
        successor.start()
        hold(max(frozen_at + _FROZEN_SECONDS - now(), 0))

        thawed_at = now()
        late_agent = [pid for pid in frozen if pid == writer.process.pid]
        thaw_all(frozen if agent_first else [pid for pid in frozen if pid not in late_agent])
        wait_for(
            "the thawed backends to end or the time to pass",
            lambda: all(reader.closed.is_set() for reader in readers) or now() > thawed_at + _LISTEN_SECONDS,
        )
        thaw_all(late_agent)
        wait_for("the fenced PostgreSQL to end", lambda: not writer.process.is_running or not writer.postgres_pids())
        before = sum(reader.bytes_between(began, frozen_at) for reader in readers)
        after = sum(reader.bytes_between(thawed_at, now() + 1) for reader in readers)
    finally:
        for reader in readers:
            reader.close()
    if writer.process.is_running:
        writer.process.stop()
    shutil.rmtree(writer.data)
    cluster.command("grant", "--compute", successor.admin.url, "--term", str(successor.term))
    successor.wait_running()
    return before, after


def control(writer: Writer) -> int:
    """The same clients over a short freeze without a fence: returns the bytes after the thaw, which must not be zero."""
    readers = [Reader(writer) for _ in range(_CLIENTS)]
    try:
        wait_for("answers to flow", lambda: all(reader.arrivals for reader in readers))
        frozen = writer.process.freeze_tree()
        hold(_FROZEN_SECONDS)
        thawed_at = now()
        thaw_all(frozen)
        hold(_LISTEN_SECONDS)
        return min(reader.bytes_between(thawed_at, now()) for reader in readers)
    finally:
        for reader in readers:
            reader.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chaos.fenced_reads", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"fenced reads: {options.repetitions} repetitions, seed {seed}", flush=True)
    source = random.Random(seed)
    checks = Checks()
    late: list[int] = []
    silent = 0
    try:
        with LocalCluster() as cluster:
            cluster.expect_log("WARN", "ERROR")
            after = control(cluster.start_writer())
            checks.at_least("bytes to each client after a thaw that was not fenced (the control)", after, 1)
            for number in range(options.repetitions):
                before, after = repeat(cluster, cluster.writers[-1], source, agent_first=number % 2 == 0)
                silent += before == 0
                late.append(after)
                if (number + 1) % 10 == 0:
                    print(f"  {number + 1} repetitions, {sum(late)} late bytes", flush=True)
        checks.equal("repetitions", len(late), options.repetitions)
        checks.equal("repetitions in which no answer flowed before the freeze", silent, 0)
        checks.equal("bytes that arrived after the thaw of a fenced writer", sum(late), 0)
    finally:
        remove_templates()
    print(checks.text(), flush=True)
    return 0 if checks.good() else 1


if __name__ == "__main__":
    sys.exit(main())
