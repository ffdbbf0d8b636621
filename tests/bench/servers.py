"""The servers under comparison, started side by side, and pgbench against either of them."""

import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import environment, give_to_postgres, is_root, scratch
from lakebase_testing.postgres import StockServer, base_backup, run_as_postgres
from lakebase_testing.process import Process
from lakebase_testing.waiting import wait_for

# The same for all servers: enough memory that the disk is written by commits and checkpoints only.
SETTINGS: Mapping[str, str] = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "max_connections": "200",
    "jit": "off",
    "autovacuum": "off",
}
STANDBYS = ("a", "b", "c")


@dataclass
class Bench:
    """What pgbench found: transactions per second and, where asked for, the median latency."""

    tps: float
    transactions: int
    p50_ms: float | None = None


def pgbench(port: int, *arguments: str, log_latency: bool = False) -> Bench:
    """Runs pgbench; returns its figures."""
    with tempfile.TemporaryDirectory() as name:
        directory = give_to_postgres(Path(name))
        extra = ["--log", f"--log-prefix={directory}/log"] if log_latency else []
        done = run_as_postgres(
            "pgbench", "--host=127.0.0.1", f"--port={port}", "--username=postgres", *extra, *arguments, "postgres"
        )
        failed = re.search(r"number of failed transactions: (\d+)", done.stdout)
        assert failed is None or failed.group(1) == "0", done.stdout
        tps = re.search(r"tps = ([\d.]+)", done.stdout)
        count = re.search(r"number of transactions actually processed: (\d+)", done.stdout)
        assert tps is not None, done.stdout
        assert count is not None, done.stdout
        latencies = [int(line.split()[2]) for file in directory.iterdir() for line in file.read_text().splitlines()]
        p50 = statistics.median(latencies) / 1000 if latencies else None
        return Bench(float(tps.group(1)), int(count.group(1)), p50)


@dataclass
class Stock:
    """Stock PostgreSQL with local fsync and, with `quorum`, three synchronous pg_receivewal of which two must answer."""

    quorum: bool
    directory: Path = field(default_factory=lambda: scratch("stock"))
    receivers: list[Process] = field(default_factory=list[Process])

    def start(self, stack: ExitStack) -> None:
        """Starts everything; `stack` ends it."""
        self.server = StockServer.create(self.directory, base_backup(64), settings={**SETTINGS, "fsync": "on"})
        stack.callback(self._stop)
        self.server.start()
        if not self.quorum:
            return
        for name in STANDBYS:
            target = self.directory / name
            target.mkdir()
            give_to_postgres(target)
            receiver = Process(
                name=f"receiver-{name}",
                command=[
                    str(environment().postgres_bin / "pg_receivewal"), f"--directory={target}", "--synchronous",
                    "--no-password", "--dbname", f"host=127.0.0.1 port={self.server.port} user=postgres application_name={name}",
                ],
                log=self.directory / f"{name}.log",
                user=environment().postgres_user if is_root() else None,
            )  # fmt: skip
            receiver.start()
            self.receivers.append(receiver)
        with self.server.connect() as connection:
            connection.execute(f"alter system set synchronous_standby_names = 'ANY 2 ({','.join(STANDBYS)})'")
            connection.execute("select pg_reload_conf()")

        def in_step() -> bool:
            with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
                row = connection.execute(
                    "select count(*) from pg_stat_replication where sync_state = 'quorum'"
                ).fetchone()
            return row is not None and row[0] == len(STANDBYS)

        wait_for("three synchronous receivers", in_step, 60)

    def _stop(self) -> None:
        for process in [*self.receivers, self.server.process]:
            if process.is_running:
                process.kill()
        shutil.rmtree(self.directory)

    @property
    def port(self) -> int:
        """Its port."""
        return self.server.port

    def followers(self) -> list[int]:
        """Process ids of the receivers and of the walsenders that feed them: what stands where safekeepers and agent stand."""
        with self.server.connect() as connection:
            senders = [row[0] for row in connection.execute("select pid from pg_stat_replication").fetchall()]
        return [*(receiver.pid for receiver in self.receivers), *senders]


def lakebase(stack: ExitStack) -> tuple[LocalCluster, Writer]:
    """Starts three safekeepers with mTLS and a writer."""
    cluster = stack.enter_context(LocalCluster(segment_mib=64))
    # An agent and three safekeepers share two cores with pgbench: pauses are no trouble here.
    cluster.expect_log("WARN")
    return cluster, cluster.start_writer(parameters=SETTINGS)


def initialise(ports: Sequence[int], scale: int) -> None:
    """Makes pgbench's tables in each server."""
    for port in ports:
        run_as_postgres(
            "pgbench", "--host=127.0.0.1", f"--port={port}", "--username=postgres", "--initialize", "--quiet",
            f"--scale={scale}", "postgres", timeout_seconds=900,
        )  # fmt: skip
        run_as_postgres(
            "psql", "--host=127.0.0.1", f"--port={port}", "--username=postgres", "--command=checkpoint", "postgres"
        )
