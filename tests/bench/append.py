"""P1: durable appends to one safekeeper against the best method of `toy_log`, each under its own client."""

import json
import os
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from bench.report import Row, compare
from lakebase_testing.cluster import LocalCluster
from lakebase_testing.environment import environment, scratch
from lakebase_testing.ports import free_port
from lakebase_testing.waiting import wait_for

SOURCES = Path(__file__).parent / "yardstick"
ROUNDS = 5
APPEND_BYTES = 65536
OUTSTANDING = 32
# With the spare segments (64 at most) no segment is made during a run.
TOTAL_MIB = 960
TOY_SECONDS = 2
# Every segment of a run is a recycled one, as in a log whose consumers keep up; the toy's ring is written before, too.
SPARE_SEGMENTS = TOTAL_MIB // 16 + 4
SERVER_CORE, CLIENT_CORE = 0, 1


def pin(core: int) -> list[str]:
    """Command line that keeps a program on one core."""
    return ["taskset", "-c", str(core % (os.cpu_count() or 1))]


@dataclass
class Toy:
    """The yardstick and its client, compiled, and its file."""

    directory: Path

    @staticmethod
    def build() -> "Toy":
        """Compiles both into a new directory."""
        directory = scratch("toy")
        for name in ("toy_log", "load"):
            subprocess.run(
                ["cc", "-O2", "-g", "-o", str(directory / name), str(SOURCES / f"{name}.c")],
                check=True,
                capture_output=True,
            )
        return Toy(directory)

    def run(self, method: str) -> float:
        """Measures one method; returns MB/s."""
        port = free_port()
        server = subprocess.Popen(
            [*pin(SERVER_CORE), str(self.directory / "toy_log"), str(port), str(self.directory / "ring"), "-m", method]
        )
        try:
            wait_listening(port, server)
            line = subprocess.run(
                [*pin(CLIENT_CORE), str(self.directory / "load"), "log", str(port), "-d", str(OUTSTANDING),
                 "-s", str(APPEND_BYTES), "-t", str(TOY_SECONDS), "-n", method],
                check=True, capture_output=True, text=True,
            ).stdout.split("\t")  # fmt: skip
        finally:
            server.kill()
            server.wait()
        return float(line[4]) * APPEND_BYTES / 1e6

    def best(self) -> str:
        """Finds out which durable method is the fastest on this disk."""
        figures = {method: self.run(method) for method in ("dsync", "link", "fsync")}
        print("  toy_log:", ", ".join(f"{name} {mb:.0f} MB/s" for name, mb in figures.items()), flush=True)
        return max(figures, key=figures.__getitem__)


def wait_listening(port: int, server: "subprocess.Popen[bytes]") -> None:
    """Waits until a yardstick listens."""

    def listening() -> bool:
        assert server.poll() is None, f"the toy ended with {server.returncode}: io_uring forbidden?"
        hex_port = f":{port:04X} "
        return any(hex_port in line and " 0A " in line for line in Path("/proc/net/tcp").read_text().splitlines())

    wait_for("the toy to listen", listening, 30)


def ours(*, tls: bool) -> dict[str, float]:
    """Measures a fresh log of one safekeeper; returns what `append-load` prints."""
    cluster = LocalCluster(members=1, segment_mib=64, tls=tls)
    cluster.expect_log("TLS is off")
    safekeeper = cluster.safekeepers[0]
    safekeeper.config.write_text(
        safekeeper.config.read_text().replace("spare_segments = 2", f"spare_segments = {SPARE_SEGMENTS}")
    )
    safekeeper.process.wrapper = pin(SERVER_CORE)
    with cluster:
        wait_for("spare segments", lambda: len(list((safekeeper.data / "spares").iterdir())) >= SPARE_SEGMENTS, 120)
        os.sync()
        writer = str(uuid.uuid4())
        cluster.fence(1, writer)
        status = safekeeper.log_status()
        command = [
            *pin(CLIENT_CORE), str(environment().bin / "append-load"),
            "--address", f"127.0.0.1:{safekeeper.ports['append']}",
            "--log", f"{cluster.id}/{cluster.branch}",
            "--system-id", str(status["system_id"]),
            "--term", "1", "--writer", writer,
            "--append-bytes", str(APPEND_BYTES), "--outstanding", str(OUTSTANDING), "--total-mib", str(TOTAL_MIB),
        ]  # fmt: skip
        if cluster.authority is not None:
            cluster.authority.issue("compute", "load")
            command += ["--tls-dir", str(cluster.authority.directory), "--tls-name", "load"]
        before = cpu_seconds(safekeeper.process.pid)
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, f"append-load: {result.stdout}{result.stderr}\n{cluster.report()}"
        figures: dict[str, float] = json.loads(result.stdout)
        appends = TOTAL_MIB * (1 << 20) / APPEND_BYTES
        figures["server_cpu_us"] = (cpu_seconds(safekeeper.process.pid) - before) / appends * 1e6
    return figures


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, ended threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure() -> list[Row]:
    """Alternates toy and ours; returns P1 and P1-tls."""
    toy = Toy.build()
    try:
        method = toy.best()
        plain: list[tuple[float, float]] = []
        encrypted: list[tuple[float, float]] = []
        for number in range(ROUNDS):
            reference = toy.run(method)
            time.sleep(1)
            without, with_tls = ours(tls=False), ours(tls=True)
            plain.append((without["mb_per_second"], reference))
            encrypted.append((with_tls["mb_per_second"], reference))
            print(
                f"  round {number + 1}: toy {reference:.0f}, ours {plain[-1][0]:.0f} ({without['server_cpu_us']:.0f} us CPU, "
                f"p50 {without['p50_us']:.0f} us), with TLS {encrypted[-1][0]:.0f} ({with_tls['server_cpu_us']:.0f} us) MB/s",
                flush=True,
            )
    finally:
        shutil.rmtree(toy.directory)
    what = "durable append, 64 KiB x 32 outstanding, one safekeeper"
    return [
        compare("P1", what, "MB/s", plain, 0.9, "higher"),
        compare("P1-tls", f"{what}, mTLS", "MB/s", encrypted, None, "higher"),
    ]
