"""The run: load, a schedule of faults and writer changes, then the verdict."""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from chaos import verdict
from chaos.checks import Checks
from chaos.kinds import KINDS, PAGE_KINDS, S3_KINDS, Scene
from lakebase_testing.clients import Auditor, Inserters, Pgbench, create_table
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.faults import SmallDisk, without_io_uring
from lakebase_testing.followers import Receiver
from lakebase_testing.page_service import ObjectStorage, PageServer, PageServiceSettings
from lakebase_testing.process import thaw_all
from lakebase_testing.waiting import hold, wait_for

# What ten minutes must bring; shorter runs in proportion, at least one of each kind and two writer changes.
_LONG_SECONDS = 600
_LONG_FAULTS_PER_KIND = 6
_LONG_CHANGES = 10
_LONG_IDS = 20_000
_LONG_AUDITS = 60
CHANGE = "change of the writer"
# How the old writer is when its successor is granted the next term.
_WAYS = ("killed", "running", "frozen")
# WAL that pgbench makes in ten minutes, its replay on each recovery, and the final copies must stay in proportion.
_SETTINGS = {"max_wal_size": "1GB", "shared_buffers": "128MB", "jit": "off"}
# With page servers: less than the data in memory and on the disk, so that blocks leave and come back all the time.
_PAGE_SETTINGS = {"max_wal_size": "256MB", "shared_buffers": "4MB", "jit": "off"}
_CACHE_BYTES = 16 << 20
# Of the first page server: less than all its layers.
_DISK_MIB = 64
# The last writer alone, which may run for a few seconds only.
_BLOCKS_MIN = 1000


@dataclass(frozen=True)
class Plan:
    """Length and seed, and what follows from them."""

    seconds: int
    seed: int
    # 0: writers start from a base backup and replay the log.
    page_servers: int = 0
    object_storage: ObjectStorage = "file"

    @property
    def kinds(self) -> dict[str, Callable[[Scene], str]]:
        """What can go wrong."""
        if self.page_servers == 0:
            return KINDS
        return KINDS | PAGE_KINDS | (S3_KINDS if self.object_storage == "s3" else {})

    @property
    def settings(self) -> dict[str, str]:
        """Of PostgreSQL."""
        return _PAGE_SETTINGS if self.page_servers else _SETTINGS

    @property
    def page_service(self) -> PageServiceSettings | None:
        """Where pages come from."""
        if self.page_servers == 0:
            return None
        # Small layers often, so that faults hit uploads and compaction, too.
        return PageServiceSettings(
            shards=self.page_servers, object_storage=self.object_storage, cache_bytes=_CACHE_BYTES, archive=True,
            freeze_bytes="2MiB", freeze_interval="2s",
        )  # fmt: skip

    @property
    def command(self) -> str:
        """What repeats the run."""
        pages = f" --page-servers {self.page_servers} --object-storage {self.object_storage}"
        return f"python -m chaos --seconds {self.seconds} --seed {self.seed}{pages if self.page_servers else ''}"

    def minimum(self, long: int, least: int) -> int:
        """Scales a figure of the long run."""
        return max(long * self.seconds // _LONG_SECONDS, least)

    @property
    def faults_per_kind(self) -> int:
        """How often each kind must happen."""
        return self.minimum(_LONG_FAULTS_PER_KIND, 2)

    @property
    def changes(self) -> int:
        """How often the writer must change."""
        return self.minimum(_LONG_CHANGES, len(_WAYS))

    @property
    def ids(self) -> int:
        """How many ids must be acknowledged."""
        return self.minimum(_LONG_IDS, 100)

    @property
    def audits(self) -> int:
        """How often everything must have been read under load."""
        return self.minimum(_LONG_AUDITS, 5)

    def schedule(self, source: random.Random) -> list[str]:
        """Returns the acts in their order."""
        acts = [kind for kind in self.kinds for _ in range(self.faults_per_kind)] + [CHANGE] * self.changes
        source.shuffle(acts)
        return acts


class Run:
    """State of a run."""

    def __init__(self, plan: Plan, cluster: LocalCluster, disk: SmallDisk | None) -> None:
        self.plan = plan
        self.cluster = cluster
        self.disk = disk
        self.source = random.Random(plan.seed)
        self.counts: Counter[str] = Counter()
        self.writer: Writer | None = None
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line with the time."""
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", flush=True)

    def target(self) -> str | None:
        """Where clients connect to."""
        return None if self.writer is None else self.writer.dsn()

    def change_writer(self, inserters: Inserters, pgbench: Pgbench) -> str:
        """Gives the log to a new writer; the old one runs, stands still or is dead when that happens."""
        old = self.writer
        assert old is not None
        way = _WAYS[self.counts[CHANGE] % len(_WAYS)]
        frozen: list[int] = []
        if way == "frozen":
            frozen = old.process.freeze_tree()
        elif way == "killed":
            old.process.kill()
        self.writer = self.cluster.start_writer(self.plan.settings, timeout_seconds=120)
        inserters.drop_connections()
        pgbench.restart()
        if frozen:
            thaw_all(frozen)
        if way != "killed":
            wait_for(
                "the fenced writer's PostgreSQL to end", lambda: not old.process.is_running or not old.postgres_pids()
            )
            if old.process.is_running:
                assert old.state() == "fenced", f"{old.name} is {old.state()}"
                old.process.stop()
        shutil.rmtree(old.data)
        return f"{old.name} ({way}) -> {self.writer.name}, term {self.cluster.term}"

    def act(self, kind: str, inserters: Inserters, pgbench: Pgbench) -> None:
        """Makes one fault, or changes the writer."""
        began = time.monotonic()
        if kind == CHANGE:
            what = self.change_writer(inserters, pgbench)
        else:
            assert self.writer is not None
            what = self.plan.kinds[kind](Scene(self.cluster, self.writer, self.source, self.disk))
        self.counts[kind] += 1
        self.say(f"{kind}: {what} ({time.monotonic() - began:.1f} s); {inserters.count()} ids acknowledged")

    def progress(self, inserters: Inserters, ids: int = 20) -> None:
        """Waits until commits go on: each fault hits a cluster that works."""
        wanted = inserters.count() + ids
        wait_for("commits to go on", lambda: inserters.count() >= wanted, 90)


def small_disk(stack: ExitStack, page_server: PageServer) -> SmallDisk:
    """Gives a page server a disk of its own that can be filled."""
    disk = stack.enter_context(SmallDisk(page_server.data, _DISK_MIB))
    page_server.process.wrapper = [*disk.wrapper, *page_server.process.wrapper]
    page_server.files = disk.path
    return disk


def run(plan: Plan, *, no_io_uring: bool = False) -> Checks:
    """Makes a run and judges it; returns the checks.

    Raises: AssertionError where the cluster does not come back from a fault; the logs are printed then.
    """
    checks = Checks()
    print(f"chaos: {plan.seconds} s, seed {plan.seed}: {plan.command}", flush=True)
    cluster = LocalCluster(wrapper=without_io_uring() if no_io_uring else (), page_service=plan.page_service)
    with ExitStack() as stack:
        disk = small_disk(stack, cluster.page_servers[0]) if cluster.page_servers else None
        stack.enter_context(cluster)
        cluster.expect_log("WARN", "ERROR")
        state = Run(plan, cluster, disk)
        # Into an empty directory pg_receivewal stores from the present end on: so before there is anything.
        receiver = Receiver(cluster)
        receiver.start()
        state.writer = cluster.start_writer(plan.settings)
        Pgbench.initialise(state.writer.dsn(), scale=5)
        with state.writer.connect() as connection:
            create_table(connection)
            connection.execute("create extension amcheck")
        schedule = plan.schedule(state.source)
        state.started = time.monotonic()
        with (
            Inserters(state.target) as inserters,
            Pgbench(state.target, cluster.directory / "pgbench.log", clients=2) as pgbench,
            Auditor(state.target) as auditor,
        ):
            for number, kind in enumerate(schedule):
                state.progress(inserters)
                state.act(kind, inserters, pgbench)
                # The rest of the time is spread evenly between the acts that are left.
                left = plan.seconds - (time.monotonic() - state.started)
                hold(max(left / (len(schedule) - number), 0) * state.source.uniform(0.2, 0.6))
            state.progress(inserters)
            hold(max(plan.seconds - (time.monotonic() - state.started), 0))
            lasted = time.monotonic() - state.started
        print(f"chaos: load ended after {lasted:.0f} s", flush=True)
        checks.at_least("seconds", int(lasted), plan.seconds)
        for kind in plan.kinds:
            checks.at_least(kind, state.counts[kind], plan.faults_per_kind)
        checks.at_least(
            "faults", sum(state.counts[kind] for kind in plan.kinds), plan.faults_per_kind * len(plan.kinds)
        )
        checks.at_least(CHANGE, state.counts[CHANGE], plan.changes)
        checks.at_least("acknowledged ids", inserters.count(), plan.ids)
        if cluster.page_servers:
            # Faults are shorter than the time that a read waits.
            failed = [error for error in inserters.errors if "could not read" in error]
            checks.equal("I/O errors that clients met", failed, [])
            checks.at_least("sums of all accounts under load", auditor.audits, plan.audits)
            checks.at_least(
                "blocks that the last writer fetched", state.writer.figure("block_fills_total"), _BLOCKS_MIN
            )
            checks.at_least("blocks that it gave back", state.writer.figure("block_evictions_total"), _BLOCKS_MIN)
        verdict.judge(checks, cluster, state.writer, receiver, inserters.ids())
    return checks
