"""The run: load, a schedule of faults and writer changes, then the verdict."""

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass

from chaos import verdict
from chaos.checks import Checks
from chaos.kinds import KINDS, Scene
from lakebase_testing.clients import Inserters, Pgbench, create_table
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.faults import without_io_uring
from lakebase_testing.followers import Receiver
from lakebase_testing.process import thaw_all
from lakebase_testing.waiting import hold, wait_for

# What ten minutes must bring; shorter runs in proportion, at least one of each kind and two writer changes.
_LONG_SECONDS = 600
_LONG_FAULTS_PER_KIND = 6
_LONG_CHANGES = 10
_LONG_IDS = 20_000
CHANGE = "change of the writer"
# How the old writer is when its successor is granted the next term.
_WAYS = ("running", "frozen", "killed")
# WAL that pgbench makes in ten minutes, its replay on each recovery, and the final copies must stay in proportion.
_SETTINGS = {"max_wal_size": "1GB", "shared_buffers": "128MB", "jit": "off"}


@dataclass(frozen=True)
class Plan:
    """Length and seed, and what follows from them."""

    seconds: int
    seed: int

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
        return self.minimum(_LONG_CHANGES, 2)

    @property
    def ids(self) -> int:
        """How many ids must be acknowledged."""
        return self.minimum(_LONG_IDS, 100)

    def schedule(self, source: random.Random) -> list[str]:
        """Returns the acts in their order."""
        acts = [kind for kind in KINDS for _ in range(self.faults_per_kind)] + [CHANGE] * self.changes
        source.shuffle(acts)
        return acts


class Run:
    """State of a run."""

    def __init__(self, plan: Plan, cluster: LocalCluster) -> None:
        self.plan = plan
        self.cluster = cluster
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
        self.writer = self.cluster.start_writer(_SETTINGS, timeout_seconds=120)
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
            what = KINDS[kind](Scene(self.cluster, self.writer, self.source))
        self.counts[kind] += 1
        self.say(f"{kind}: {what} ({time.monotonic() - began:.1f} s); {inserters.count()} ids acknowledged")

    def progress(self, inserters: Inserters, ids: int = 20) -> None:
        """Waits until commits go on: each fault hits a cluster that works."""
        wanted = inserters.count() + ids
        wait_for("commits to go on", lambda: inserters.count() >= wanted, 90)


def run(plan: Plan, *, no_io_uring: bool = False) -> Checks:
    """Makes a run and judges it; returns the checks.

    Raises: AssertionError where the cluster does not come back from a fault; the logs are printed then.
    """
    checks = Checks()
    print(
        f"chaos: {plan.seconds} s, seed {plan.seed}: python -m chaos --seconds {plan.seconds} --seed {plan.seed}",
        flush=True,
    )
    with LocalCluster(wrapper=without_io_uring() if no_io_uring else ()) as cluster:
        cluster.expect_log("WARN", "ERROR")
        state = Run(plan, cluster)
        # Into an empty directory pg_receivewal stores from the present end on: so before there is anything.
        receiver = Receiver(cluster)
        receiver.start()
        state.writer = cluster.start_writer(_SETTINGS)
        Pgbench.initialise(state.writer.dsn(), scale=5)
        with state.writer.connect() as connection:
            create_table(connection)
            connection.execute("create extension amcheck")
        schedule = plan.schedule(state.source)
        state.started = time.monotonic()
        with (
            Inserters(state.target) as inserters,
            Pgbench(state.target, cluster.directory / "pgbench.log", clients=2) as pgbench,
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
        for kind in KINDS:
            checks.at_least(kind, state.counts[kind], plan.faults_per_kind)
        checks.at_least("faults", sum(state.counts[kind] for kind in KINDS), plan.faults_per_kind * len(KINDS))
        checks.at_least(CHANGE, state.counts[CHANGE], plan.changes)
        checks.at_least("acknowledged ids", inserters.count(), plan.ids)
        verdict.judge(checks, cluster, state.writer, receiver, inserters.ids())
    return checks
