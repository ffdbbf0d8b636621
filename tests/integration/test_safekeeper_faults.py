"""One safekeeper may be killed, frozen, full or broken: the others go on. Two: commits wait, and nobody is lied to."""

import re
import shutil
import time
from contextlib import ExitStack

import pytest

from lakebase_testing.clients import Acknowledgement, Inserters, create_table, longest_gap, stored_ids
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.faults import FailingDisk, SmallDisk, failing_call, without_io_uring
from lakebase_testing.waiting import hold, wait_for

HEARTBEAT_SECONDS = 0.2
# Scheduling of a dozen processes on two busy cores; what the run shows without a fault is allowed on top.
_NOISE_SECONDS = 0.15


def start(cluster: LocalCluster) -> Writer:
    """A writer with the table of acknowledged ids."""
    writer = cluster.start_writer()
    with writer.connect() as connection:
        create_table(connection)
    return writer


def assert_no_stall(inserters: Inserters, quiet: tuple[float, float], fault: tuple[float, float]) -> None:
    """Asserts that acknowledgements kept coming, compared with a quiet time of the same run."""
    acknowledged: list[Acknowledgement] = inserters.acknowledged()
    usual = longest_gap(acknowledged, *quiet)
    stall = longest_gap(acknowledged, *fault)
    print(f"longest gap: {usual * 1000:.0f} ms without a fault, {stall * 1000:.0f} ms with it")
    assert stall <= max(usual, _NOISE_SECONDS) + HEARTBEAT_SECONDS


def everything_is_found(writer: Writer, inserters: Inserters) -> None:
    """Asserts that the writer holds what the clients remember."""
    with writer.connect() as connection:
        assert inserters.ids() <= stored_ids(connection)


def test_commits_go_on_while_one_safekeeper_is_dead() -> None:
    """kill -9 of each safekeeper in turn; it comes back and catches up."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = start(cluster)
        with Inserters(writer.dsn) as inserters:
            for safekeeper in cluster.safekeepers:
                quiet_from = time.monotonic()
                hold(1.5)
                killed_at = time.monotonic()
                safekeeper.kill()
                hold(1.5)
                back_at = time.monotonic()
                safekeeper.start()
                hold(1)

                assert_no_stall(inserters, (quiet_from, killed_at), (killed_at, back_at + 1))
        everything_is_found(writer, inserters)
        cluster.wait_caught_up()


def test_commits_go_on_while_one_safekeeper_is_frozen_for_thirty_seconds() -> None:
    """A frozen member keeps its connections open: nothing may wait for them to break."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = start(cluster)
        with Inserters(writer.dsn) as inserters:
            hold(1.5)
            frozen_at = time.monotonic()
            cluster.safekeepers[1].process.freeze()
            hold(30)
            cluster.safekeepers[1].process.thaw()
            hold(1)
            assert_no_stall(inserters, (frozen_at - 1.5, frozen_at), (frozen_at, frozen_at + 31))
        everything_is_found(writer, inserters)
        cluster.wait_caught_up()


def test_commits_wait_without_a_quorum_and_go_on_with_it() -> None:
    """Two of three gone: no error, no acknowledgement, sessions stay; one back: everything that waited is acknowledged."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = start(cluster)
        with Inserters(writer.dsn) as inserters:
            wait_for("100 acknowledgements", lambda: inserters.count() >= 100)
            cluster.safekeepers[0].kill()
            cluster.safekeepers[1].kill()
            hold(0.5)
            before = inserters.count()
            hold(5)

            assert inserters.count() == before, "acknowledged without a quorum"
            assert inserters.errors == [], "a session was lost"

            cluster.safekeepers[0].start()
            wait_for("commits to go on", lambda: inserters.count() >= before + 100)
            assert inserters.errors == [], "a session was lost"
            cluster.safekeepers[1].start()
        everything_is_found(writer, inserters)
        cluster.wait_caught_up()


def test_a_safekeeper_whose_device_fails_is_left_behind() -> None:
    """EIO from the block device under io_uring: that member's log is out of service, the others carry on."""
    if reason := FailingDisk.unavailable():
        pytest.skip(reason)
    cluster = LocalCluster()
    victim = cluster.safekeepers[0]
    mounted = ExitStack()
    disk = mounted.enter_context(FailingDisk(victim.data))
    with mounted, cluster:
        cluster.expect_log("WARN", "ERROR.*(I/O error|Input/output|disk)")
        writer = start(cluster)
        with Inserters(writer.dsn) as inserters:
            wait_for("100 acknowledgements", lambda: inserters.count() >= 100)
            disk.fail()
            began = time.monotonic()
            hold(5)

            assert longest_gap(inserters.acknowledged(), began, time.monotonic()) < 1
            assert "ERROR" in victim.process.log_text(), "a failing device is worth a line"
            stored = lsn_of(victim.log_status()["flush_lsn"]) if victim.process.is_running else 0
            assert stored < max(lsn_of(other.log_status()["flush_lsn"]) for other in cluster.safekeepers[1:])
        everything_is_found(writer, inserters)
        if victim.process.is_running:
            victim.kill()
        mounted.close()


def test_a_safekeeper_whose_disk_fails_is_left_behind() -> None:
    """EIO from its disk on one safekeeper: it stops acknowledging, the others carry on, nothing is lost."""
    with LocalCluster(wrapper=without_io_uring()) as cluster:
        cluster.expect_log("WARN", "ERROR")
        writer = start(cluster)
        victim = cluster.safekeepers[2]
        victim.process.stop()
        victim.process.wrapper = [
            *without_io_uring(),
            # Lone commits are durable writes, others are writes and a sync; strace counts for each thread.
            *failing_call("pwrite64,fdatasync", "EIO", "100+", victim.directory / "strace"),
        ]
        victim.start()
        with Inserters(writer.dsn) as inserters:
            began = time.monotonic()
            hold(8)
            assert longest_gap(inserters.acknowledged(), began, began + 8) < 1
            wait_for("the fault", lambda: "(INJECTED)" in (victim.directory / "strace").read_text(), 60)
        everything_is_found(writer, inserters)
        assert "rror" in victim.process.log_text(), "a failing disk is worth a line"

        # With a good disk it starts again, from what was durable, and catches up.
        if victim.process.is_running:
            victim.process.kill()
        victim.process.wrapper = without_io_uring()
        victim.start()
        cluster.wait_caught_up()


@pytest.mark.parametrize("wrapper", [(), without_io_uring()], ids=["io_uring", "polling"])
def test_a_full_disk_refuses_and_resumes_by_itself(wrapper: list[str]) -> None:
    """ENOSPC on one safekeeper: an error that says so, the others carry on; with space again it catches up unasked."""
    cluster = LocalCluster(headroom="32MiB")
    victim = cluster.safekeepers[0]
    with SmallDisk(victim.data, 256) as disk:
        victim.process.wrapper = [*disk.wrapper, *(wrapper or cluster.wrapper)]
        with cluster:
            cluster.expect_log("WARN", "ERROR.*(space|headroom|full)")
            writer = start(cluster)
            disk.fill()
            with Inserters(writer.dsn) as inserters, writer.connect() as connection:
                began = time.monotonic()
                connection.execute("create table bulk as select n, repeat('x', 1000) from generate_series(1, 80000) n")
                hold(2)

                assert longest_gap(inserters.acknowledged(), began, time.monotonic()) < 2
                assert re.search(r"space|headroom|full", victim.process.log_text()), "a full disk is worth a line"
                behind = lsn_of(victim.log_status()["flush_lsn"])
                assert behind < max(cluster.positions()), "the full disk still took everything"

                disk.empty()
                wait_for("the safekeeper to catch up", lambda: lsn_of(victim.log_status()["flush_lsn"]) > behind, 30)
            everything_is_found(writer, inserters)
            cluster.wait_caught_up()


def test_a_replaced_disk_does_not_come_back_under_its_old_id() -> None:
    """A safekeeper that lost its disk has forgotten its votes: it must not vote or acknowledge as the member it was."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN", "ERROR.*disk")
        writer = start(cluster)
        victim = cluster.safekeepers[1]
        victim.kill()
        shutil.rmtree(victim.data)
        victim.start()
        with Inserters(writer.dsn) as inserters:
            wait_for("100 acknowledgements", lambda: inserters.count() >= 100)
            cluster.safekeepers[0].kill()
            hold(0.5)
            before = inserters.count()
            hold(4)

            assert inserters.count() == before, "the replaced disk was counted as a member"
            cluster.safekeepers[0].start()
            wait_for("commits to go on", lambda: inserters.count() >= before + 50)
        everything_is_found(writer, inserters)
