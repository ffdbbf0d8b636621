"""What can go wrong: each kind of fault, how it is made and how it ends.

A fault leaves the cluster whole again: its last act starts, thaws or feeds what it hurt. The change of a writer is no fault
but an act of the operator, and is in `run.py`.
"""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from lakebase_testing import procfs
from lakebase_testing.cluster import LocalCluster, Safekeeper, Writer
from lakebase_testing.process import freeze_all, thaw_all
from lakebase_testing.waiting import hold, wait_for

# Longer than the lease (1.5 s) as often as shorter.
_PAUSE_SECONDS = (0.3, 3.0)
_RECOVERY_SECONDS = 90


@dataclass(frozen=True)
class Scene:
    """What a fault may use."""

    cluster: LocalCluster
    writer: Writer
    source: random.Random

    def pause(self) -> None:
        """Lets the fault last."""
        hold(self.source.uniform(*_PAUSE_SECONDS))

    def safekeeper(self) -> Safekeeper:
        """Picks one."""
        return self.source.choice(self.cluster.safekeepers)


def kill_safekeeper(scene: Scene) -> str:
    """SIGKILL, a while of absence, a start."""
    victim = scene.safekeeper()
    victim.kill()
    scene.pause()
    victim.start()
    return victim.name


def kill_two_safekeepers(scene: Scene) -> str:
    """No quorum for a while."""
    victims = scene.source.sample(scene.cluster.safekeepers, scene.cluster.majority())
    for victim in victims:
        victim.kill()
    scene.pause()
    for victim in victims:
        victim.start()
    return ", ".join(victim.name for victim in victims)


def freeze_safekeeper(scene: Scene) -> str:
    """SIGSTOP, SIGCONT."""
    victim = scene.safekeeper()
    victim.process.freeze()
    scene.pause()
    victim.process.thaw()
    return victim.name


def starve_safekeeper(scene: Scene) -> str:
    """A few percent of the time only."""
    victim = scene.safekeeper()
    victim.process.starve()
    scene.pause()
    victim.process.feed()
    return victim.name


def kill_agent(scene: Scene) -> str:
    """SIGKILL of the agent: PostgreSQL must die with it; the same writer comes back as the next attempt of its term."""
    postgres = scene.writer.postgres_pids()
    scene.writer.process.kill()
    wait_for("PostgreSQL to die with its agent", lambda: all(procfs.state(p) in (None, "Z") for p in postgres), 10)
    scene.cluster.restart_writer(scene.writer, _RECOVERY_SECONDS)
    return scene.writer.name


def freeze_agent(scene: Scene) -> str:
    """The agent alone stands still, PostgreSQL goes on into its wait."""
    scene.writer.process.freeze()
    scene.pause()
    scene.writer.process.thaw()
    return scene.writer.name


def starve_agent(scene: Scene) -> str:
    """Agent and PostgreSQL get a few percent of the time."""
    scene.writer.process.starve(share=0.1)
    scene.pause()
    scene.writer.process.feed()
    return scene.writer.name


def kill_postgres(scene: Scene) -> str:
    """SIGKILL of the postmaster or one of its children: the agent recovers without an operator."""
    pid = scene.source.choice(scene.writer.postgres_pids())
    what = procfs.command_line(pid)
    attempt = scene.writer.status()["attempt"]
    os.kill(pid, signal.SIGKILL)
    wait_for(
        "the agent to notice",
        lambda: scene.writer.status()["attempt"] != attempt or scene.writer.state() != "running",
        20,
    )
    scene.writer.wait_running(_RECOVERY_SECONDS)
    return what


def freeze_postgres(scene: Scene) -> str:
    """All of PostgreSQL stands still, the agent goes on with heartbeats."""
    frozen = freeze_all(scene.writer.postgres_pids)
    scene.pause()
    thaw_all(frozen)
    return f"{len(frozen)} processes"


def freeze_everything(scene: Scene) -> str:
    """Agent and PostgreSQL stand still together, as in a suspended machine."""
    frozen = scene.writer.process.freeze_tree()
    scene.pause()
    thaw_all(frozen)
    return f"{len(frozen)} processes"


KINDS: dict[str, Callable[[Scene], str]] = {
    "kill safekeeper": kill_safekeeper,
    "kill two safekeepers": kill_two_safekeepers,
    "freeze safekeeper": freeze_safekeeper,
    "starve safekeeper": starve_safekeeper,
    "kill agent": kill_agent,
    "freeze agent": freeze_agent,
    "starve agent": starve_agent,
    "kill postgres": kill_postgres,
    "freeze postgres": freeze_postgres,
    "freeze everything": freeze_everything,
}
