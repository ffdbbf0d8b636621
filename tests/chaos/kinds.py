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
from lakebase_testing.faults import SmallDisk
from lakebase_testing.page_service import PageServer
from lakebase_testing.process import freeze_all, thaw_all
from lakebase_testing.storage_faults import storage_outage
from lakebase_testing.waiting import hold, wait_for

# Longer than the lease (1.5 s) as often as shorter.
_PAUSE_SECONDS = (0.3, 3.0)
_RECOVERY_SECONDS = 90
# Most processes of a server live as long as it does.
_PICKS_MAX = 20
_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class Scene:
    """What a fault may use."""

    cluster: LocalCluster
    writer: Writer
    source: random.Random
    # Of the first page server, where there are any.
    disk: SmallDisk | None = None

    def pause(self) -> None:
        """Lets the fault last."""
        hold(self.source.uniform(*_PAUSE_SECONDS))

    def safekeeper(self) -> Safekeeper:
        """Picks one."""
        return self.source.choice(self.cluster.safekeepers)

    def page_server(self) -> PageServer:
        """Picks one."""
        return self.source.choice(self.cluster.page_servers)


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
    pid, what = stopped_postgres(scene)
    attempt = scene.writer.status()["attempt"]
    os.kill(pid, signal.SIGKILL)
    wait_for(
        "the agent to notice",
        lambda: scene.writer.status()["attempt"] != attempt or scene.writer.state() != "running",
        20,
    )
    scene.writer.wait_running(_RECOVERY_SECONDS)
    return what


def stopped_postgres(scene: Scene) -> tuple[int, str]:
    """Picks a process and stops it: one that ends by itself just now would be killed without anybody noticing."""
    for _ in range(_PICKS_MAX):
        pid = scene.source.choice(scene.writer.postgres_pids())
        # The postmaster's has all its settings.
        what = procfs.command_line(pid)[:_NAME_CHARACTERS]
        if procfs.send_signal(pid, signal.SIGSTOP):
            state = wait_for("a process to stop or to be gone", lambda pid=pid: _stopped_or_gone(procfs.state(pid)), 10)
            if state == "T":
                return pid, what
    raise AssertionError("each process that was picked had ended")


def _stopped_or_gone(state: str | None) -> str | None:
    if state in (None, "Z", "X"):
        return "gone"
    return state if state == "T" else None


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


def kill_page_server(scene: Scene) -> str:
    """SIGKILL, a while of absence, a start as the next generation with what it had on its disk."""
    victim = scene.page_server()
    victim.kill()
    scene.pause()
    scene.cluster.restart_page_server(victim, disk=True)
    return victim.name


def lose_page_server(scene: Scene) -> str:
    """The same without its disk."""
    victim = scene.page_server()
    victim.kill()
    scene.pause()
    scene.cluster.restart_page_server(victim, disk=False)
    return victim.name


def lose_all_page_servers(scene: Scene) -> str:
    """All of them die with their disks: what is durable is in object storage and on the safekeepers."""
    for victim in scene.cluster.page_servers:
        victim.kill()
    scene.pause()
    for victim in scene.cluster.page_servers:
        scene.cluster.restart_page_server(victim, disk=False)
    return ", ".join(victim.name for victim in scene.cluster.page_servers)


def freeze_page_server(scene: Scene) -> str:
    """SIGSTOP, SIGCONT."""
    victim = scene.page_server()
    victim.process.freeze()
    scene.pause()
    victim.process.thaw()
    return victim.name


def starve_page_server(scene: Scene) -> str:
    """A few percent of the time only."""
    victim = scene.page_server()
    victim.process.starve()
    scene.pause()
    victim.process.feed()
    return victim.name


def lose_object_storage(scene: Scene) -> str:
    """Every request fails for a while."""
    with storage_outage(scene.cluster, "away"):
        scene.pause()
        scene.pause()
    return scene.cluster.object_storage


def silence_object_storage(scene: Scene) -> str:
    """Requests are taken, and not answered for a while."""
    with storage_outage(scene.cluster, "silent"):
        scene.pause()
        scene.pause()
    return scene.cluster.object_storage


def lose_object_storage_and_page_server(scene: Scene) -> str:
    """A page server dies while object storage is away, and its successor is there before that comes back."""
    victim = scene.page_server()
    # A directory that is not there is refused as a mistake in the configuration.
    waits = scene.cluster.object_storage.startswith("s3://")
    with storage_outage(scene.cluster, "away"):
        victim.kill()
        if waits:
            victim.start()
        scene.pause()
    if not waits:
        victim.start()
    victim.wait_ready()
    return victim.name


def fill_disk(scene: Scene) -> str:
    """The disk of the first page server has no room for a while."""
    assert scene.disk is not None
    scene.disk.fill()
    scene.pause()
    scene.pause()
    scene.disk.empty()
    return scene.cluster.page_servers[0].name


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

# Where there are page servers. Writers begin on an empty disk there: also when an agent is killed.
PAGE_KINDS: dict[str, Callable[[Scene], str]] = {
    "kill page server": kill_page_server,
    "lose page server": lose_page_server,
    "lose all page servers": lose_all_page_servers,
    "freeze page server": freeze_page_server,
    "starve page server": starve_page_server,
    "lose object storage": lose_object_storage,
    "lose object storage and page server": lose_object_storage_and_page_server,
    "fill disk of page server": fill_disk,
}

# Where object storage is a server.
S3_KINDS: dict[str, Callable[[Scene], str]] = {
    "silence object storage": silence_object_storage,
}
