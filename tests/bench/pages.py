"""P6, P7, P8: GetPage of one page server against `toy_pages`, each under its own client."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.append import CLIENT_CORE, SERVER_CORE, SOURCES, pin, wait_listening
from bench.databases import Database, Relation, pgbench_database
from bench.reads import Reads
from bench.report import Row, compare, fact
from lakebase_testing.cluster import LocalCluster
from lakebase_testing.environment import environment, scratch
from lakebase_testing.page_service import PageServer, PageServiceSettings
from lakebase_testing.ports import free_port
from lakebase_testing.waiting import wait_for

ROUNDS = 3
SECONDS = 2
# 32 MiB: half of a page server's cache of blocks.
PAGES_IN_MEMORY = 4096
# So large that most reads find the page neither in that cache nor, in the few seconds of a run, in the kernel's.
SCALE_ON_DISK = 40
# Of each page up to 4 rows are changed, each by a record or two: the page is made of an image layer and a delta layer.
CHANGE = "update pgbench_accounts set abalance = abalance + 1 where aid % 61 < (aid / 61) % 5"


@dataclass(frozen=True)
class Load:
    """What a client measured."""

    pages_per_second: float
    p50_us: float
    server_cpu_us: float


@dataclass
class Toy:
    """The yardstick and its client, compiled."""

    directory: Path

    @staticmethod
    def build() -> "Toy":
        """Compiles both into a new directory."""
        directory = scratch("toy")
        for name in ("toy_pages", "load"):
            subprocess.run(
                ["cc", "-O2", "-g", "-o", str(directory / name), str(SOURCES / f"{name}.c")],
                check=True,
                capture_output=True,
            )
        return Toy(directory)

    @contextmanager
    def serve(self, pages: int, *, on_disk: bool) -> Generator[tuple[int, int]]:
        """Runs the server for a block; gives its port and process id."""
        port = free_port()
        where = str(self.directory / "pages") if on_disk else "mem"
        server = subprocess.Popen([*pin(SERVER_CORE), str(self.directory / "toy_pages"), str(port), where, str(pages)])
        try:
            wait_listening(port, server)
            yield port, server.pid
        finally:
            server.kill()
            server.wait()

    def run(self, server: tuple[int, int], pages: int, depth: int, seconds: float = SECONDS) -> Load:
        """Measures a server that runs."""
        line = subprocess.run(
            [*pin(CLIENT_CORE), str(self.directory / "load"), "pages", str(server[0]), "-d", str(depth), "-N", str(pages),
             "-t", str(seconds), "-p", str(server[1]), "-n", "toy"],
            check=True, capture_output=True, text=True,
        ).stdout.split("\t")  # fmt: skip
        return Load(float(line[4]), float(line[5]), float(line[8]))


def pageserver_cluster(database: Database, *, tls: bool, settings: PageServiceSettings | None = None) -> LocalCluster:
    """Describes a lakebase with one safekeeper and one page server, which has a core for itself."""
    # As products run: layers are frozen by size.
    chosen = settings or PageServiceSettings(shards=1, freeze_bytes="64MiB", freeze_interval="60s")
    cluster = LocalCluster(members=1, tls=tls, backup=database.data, page_service=chosen)
    # All processes share two cores: pauses are no trouble here.
    cluster.expect_log("WARN")
    cluster.page_servers[0].process.wrapper = pin(SERVER_CORE)
    return cluster


def page_load(
    cluster: LocalCluster,
    page_server: PageServer,
    relation: Relation,
    *arguments: str,
    blocks: int | None = None,
    depth: int = 1,
    seconds: float = SECONDS,
) -> Load:
    """Measures a page server that runs."""
    command = [
        *pin(CLIENT_CORE), str(environment().bin / "page-load"),
        "--address", f"127.0.0.1:{page_server.ports['pages']}", "--log", f"{cluster.id}/{cluster.branch}",
        "--shard", str(page_server.shard), "--relation", str(relation), "--blocks", str(blocks or relation.blocks),
        "--depth", str(depth), "--seconds", str(seconds), "--pid", str(page_server.process.pid), *arguments,
    ]  # fmt: skip
    if cluster.authority is not None:
        cluster.authority.issue("compute", "load")
        command += ["--tls-dir", str(cluster.authority.directory), "--tls-name", "load"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, f"page-load: {result.stdout}{result.stderr}\n{cluster.report()}"
    figures: dict[str, float] = json.loads(result.stdout)
    return Load(figures["pages_per_second"], figures["p50_us"], figures["server_cpu_us"])


def forget_cached_files(directory: Path) -> None:
    """Drops what the kernel has cached of all files below a directory."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def per_core(loads: Sequence[tuple[Load, Load]]) -> list[tuple[float, float]]:
    """Pages for each second of the server's CPU time."""
    return [(1e6 / ours.server_cpu_us, 1e6 / toy.server_cpu_us) for ours, toy in loads]


def from_memory(toy: Toy) -> list[Row]:
    """P6 and P8: pages that the server has in memory, without TLS and with."""
    single: dict[bool, list[tuple[Load, Load]]] = {False: [], True: []}
    deep: dict[bool, list[tuple[Load, Load]]] = {False: [], True: []}
    with ExitStack() as stack:
        database = stack.enter_context(pgbench_database(5))
        clusters = {tls: stack.enter_context(pageserver_cluster(database, tls=tls)) for tls in (False, True)}
        server = stack.enter_context(toy.serve(PAGES_IN_MEMORY, on_disk=False))
        for number in range(ROUNDS):
            for tls, cluster in clusters.items():
                for depth, pairs in ((1, single[tls]), (32, deep[tls])):
                    reference = toy.run(server, PAGES_IN_MEMORY, depth)
                    ours = page_load(
                        cluster, cluster.page_servers[0], database.accounts, "--warm-up",
                        blocks=PAGES_IN_MEMORY, depth=depth,
                    )  # fmt: skip
                    pairs.append((ours, reference))
                    _show(number, f"memory, depth {depth}{', TLS' if tls else ''}", ours, reference)
    rows: list[Row] = []
    for tls, suffix, words in ((False, "", ""), (True, "-tls", ", mTLS")):
        p50 = [(ours.p50_us, reference.p50_us) for ours, reference in single[tls]]
        rates = [(ours.pages_per_second, reference.pages_per_second) for ours, reference in deep[tls]]
        goals = (1.1, 0.9) if not tls else (None, None)
        rows += [
            compare(f"P6{suffix}", f"GetPage p50, 1 outstanding, in memory{words} ÷ toy", "us", p50, goals[0], "lower"),
            compare(
                f"P8{suffix}", f"GetPage/s per core, 32 outstanding{words} ÷ toy", "1/s", per_core(deep[tls]), goals[1],
                "higher",
            ),
            compare(f"P8-wall{suffix}", f"GetPage/s, 32 outstanding{words} ÷ toy", "1/s", rates, None, "higher"),
        ]  # fmt: skip
    return rows


def _is_local(page_server: PageServer) -> bool:
    status = page_server.status()
    layers = sum(int(str(status[f"{kind}_layers"])) for kind in ("image", "level0", "level1"))
    return int(str(status["local_layers"])) == layers


def from_disk(toy: Toy) -> list[Row]:
    """P7: pages that have to be read, with up to 8 changes each."""
    pairs: list[tuple[Load, Load]] = []
    with ExitStack() as stack:
        database = stack.enter_context(pgbench_database(SCALE_ON_DISK))
        cluster = stack.enter_context(pageserver_cluster(database, tls=False))
        page_server = cluster.page_servers[0]
        writer = cluster.start_writer({"shared_buffers": "1GB", "autovacuum": "off"})
        with writer.connect() as connection:
            connection.execute(CHANGE)
        writer.stop_cleanly()
        page_server.freeze()
        blocks = database.accounts.blocks
        server = stack.enter_context(toy.serve(blocks, on_disk=True))
        # Layers of an import are in object storage only until somebody reads of them.
        page_load(cluster, page_server, database.accounts, depth=8)
        wait_for("all layers to be on the disk", lambda: _is_local(page_server), 120)
        before = Reads.of(page_server)
        for number in range(ROUNDS):
            reference = toy.run(server, blocks, 1)
            forget_cached_files(page_server.data)
            ours = page_load(cluster, page_server, database.accounts, f"--seed={number + 1}")
            pairs.append((ours, reference))
            _show(number, "disk, depth 1", ours, reference)
        reads = Reads.of(page_server).since(before)
        made_of = f"{reads.layers:.2f} layers, {reads.blocks:.2f} blocks, {reads.values:.2f} values"
        print(f"  {made_of}, {reads.disk:.2f} disk reads per page", flush=True)
    p50 = [(ours.p50_us, reference.p50_us) for ours, reference in pairs]
    return [
        compare("P7", "GetPage p50 from disk, up to 8 changes ÷ toy with O_DIRECT", "us", p50, 1.25, "lower"),
        fact("P7-values", "values that such a page is made of", "", reads.values),
    ]


def _show(number: int, what: str, ours: Load, reference: Load) -> None:
    print(
        f"  round {number + 1}: {what}: p50 {ours.p50_us:.1f} / {reference.p50_us:.1f} us, "
        f"{ours.pages_per_second:.0f} / {reference.pages_per_second:.0f} pages/s, "
        f"server CPU {ours.server_cpu_us:.1f} / {reference.server_cpu_us:.1f} us",
        flush=True,
    )


def measure_memory() -> list[Row]:
    """P6 and P8."""
    return _with_toy(from_memory)


def measure_disk() -> list[Row]:
    """P7."""
    return _with_toy(from_disk)


def _with_toy(part: Callable[[Toy], list[Row]]) -> list[Row]:
    toy = Toy.build()
    try:
        return part(toy)
    finally:
        shutil.rmtree(toy.directory)
