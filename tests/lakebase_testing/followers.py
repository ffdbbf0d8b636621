"""Ordinary followers of the log: pg_receivewal, and a stock standby."""

import os
import signal
from collections.abc import Sequence

from lakebase_testing.cluster import LocalCluster, Safekeeper
from lakebase_testing.environment import environment, give_to_postgres, is_root
from lakebase_testing.postgres import StockServer, quote_conninfo
from lakebase_testing.process import Process
from lakebase_testing.waiting import wait_for
from lakebase_testing.wal import SAFEKEEPER_SEGMENT_BYTES, SafekeeperWal, segment_files


class Receiver:
    """A pg_receivewal that stores the log from its beginning."""

    def __init__(self, cluster: LocalCluster, name: str = "receiver") -> None:
        self._cluster = cluster
        self.directory = cluster.directory / name
        self.directory.mkdir()
        give_to_postgres(self.directory)
        credentials = cluster.follower(name)
        self.process = cluster.add_process(
            Process(
                name=name,
                command=[
                    str(environment().postgres_bin / "pg_receivewal"),
                    f"--directory={self.directory}",
                    "--dbname",
                    quote_conninfo(cluster.replication_parameters(credentials)),
                    "--synchronous",
                    "--status-interval=1",
                    "--no-password",
                ],
                log=cluster.directory / f"{name}.log",
                user=environment().postgres_user if is_root() else None,
                environment={"HOME": "/nonexistent"},
            )
        )

    def start(self) -> None:
        """Starts following."""
        self.process.start()

    def reached(self) -> int:
        """Returns a position that the stored files have surely reached: the start of the last file."""
        files = segment_files(self.directory, self._cluster.segment_bytes)
        return files[-1].start if files else 0

    def wait_stored(self, end: int, timeout_seconds: float = 60) -> None:
        """Waits until the last bytes before `end` are stored as the first safekeeper has them."""
        start = max(end - 8192, end - end % SAFEKEEPER_SEGMENT_BYTES, end - end % self._cluster.segment_bytes)
        expected = SafekeeperWal(self._cluster.safekeepers[0]).read(start, end - start)

        def stored() -> bool:
            for file in segment_files(self.directory, self._cluster.segment_bytes):
                if file.start <= start < file.start + self._cluster.segment_bytes:
                    with file.path.open("rb") as content:
                        content.seek(start - file.start)
                        return content.read(end - start) == expected
            return start == end

        wait_for(f"{self.process.name} to store the end of the log", stored, timeout_seconds)

    def stop(self) -> None:
        """Ends it in good order (SIGINT)."""
        if self.process.is_running:
            os.kill(self.process.pid, signal.SIGINT)
            self.process.wait_end(20)


def standby(cluster: LocalCluster, name: str = "standby", safekeepers: Sequence[Safekeeper] = ()) -> StockServer:
    """Makes (does not start) a stock standby that begins at the base backup and streams from the safekeepers (or some)."""
    directory = cluster.directory / name
    directory.mkdir()
    conninfo = cluster.replication_parameters(cluster.follower(name), *safekeepers)
    server = StockServer.create(directory, cluster.base_backup, primary_conninfo=conninfo)
    cluster.add_process(server.process)
    return server


def wait_replayed(server: StockServer, end: int, timeout_seconds: float = 120) -> None:
    """Waits until the standby has replayed up to `end`."""
    wait_for("the standby to replay the log", lambda: server.replayed() >= end, timeout_seconds)
