"""Terms are granted: a fenced writer gets no acknowledgement, the next one finds everything, absent members catch up."""

import threading
import time

import psycopg
import pytest

from lakebase_testing.clients import Inserters, Pgbench, create_table, stored_ids
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.waiting import hold, wait_for
from lakebase_testing.wal import assert_files_equal, assert_safekeepers_equal


def start(cluster: LocalCluster) -> Writer:
    """A writer with the table of acknowledged ids."""
    writer = cluster.start_writer()
    with writer.connect() as connection:
        create_table(connection)
    return writer


def test_the_next_writer_finds_everything_acknowledged() -> None:
    """Three changes of a living writer under load; the clients move on when their connections are cut."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN", "ERROR.*fenced")
        writer = start(cluster)
        current = [writer]
        with Inserters(lambda: current[0].dsn()) as inserters:
            for _ in range(3):
                wanted = inserters.count() + 100
                wait_for("100 acknowledgements", lambda wanted=wanted: inserters.count() >= wanted)
                old = current[0]
                current[0] = cluster.start_writer()
                inserters.drop_connections()
                if old.process.is_running:
                    old.process.stop()
        with current[0].connect() as connection:
            assert inserters.ids() <= stored_ids(connection)


def test_a_fenced_writer_gets_no_acknowledgement() -> None:
    """From the moment a majority holds the fence, whatever the old writer does."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN", "ERROR.*fenced")
        writer = start(cluster)
        with Inserters(writer.dsn) as inserters:
            wait_for("100 acknowledgements", lambda: inserters.count() >= 100)
            successor = cluster.new_writer()
            cluster.fence(2, successor.id)
            # Answers that were under way when the fence became durable arrive within this.
            hold(0.2)
            fenced_at = inserters.count()
            hold(4)
            assert inserters.count() == fenced_at

            wait_for(
                "the fenced PostgreSQL to end", lambda: not writer.process.is_running or not writer.postgres_pids()
            )
            if writer.process.is_running:
                assert writer.state() == "fenced"
            successor.start()
            cluster.term = 1
            cluster.grant(successor)
            successor.wait_running()
        with successor.connect() as connection:
            assert inserters.ids() <= stored_ids(connection)


def test_answers_wait_for_the_lease_and_sessions_end_after_its_timeout() -> None:
    """Without a majority even a read is not answered: another writer may have been granted the log meanwhile."""
    with LocalCluster(lease_wait_timeout="4s") as cluster:
        cluster.expect_log("WARN")
        writer = start(cluster)
        with writer.connect() as connection:
            connection.execute("select 1")
            for safekeeper in cluster.safekeepers[:2]:
                safekeeper.process.freeze()
            # The lease is 1.5 s.
            hold(2)
            asked_at = time.monotonic()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select 1")
            waited = time.monotonic() - asked_at
        for safekeeper in cluster.safekeepers[:2]:
            safekeeper.process.thaw()

        assert 3 < waited < 15
        wait_for("answers to come again", lambda: can_select(writer), 60)


def can_select(writer: Writer) -> bool:
    """Whether a new session is answered."""
    try:
        with writer.connect() as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def test_reads_go_on_when_the_quorum_returns_in_time() -> None:
    """The same session, the same statement: it only took longer."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = start(cluster)
        with writer.connect() as connection:
            for safekeeper in cluster.safekeepers[:2]:
                safekeeper.process.freeze()
            hold(2)
            timer = threading.Timer(3, lambda: [safekeeper.process.thaw() for safekeeper in cluster.safekeepers[:2]])
            timer.start()
            asked_at = time.monotonic()
            assert connection.execute("select 1").fetchone() == (1,)
            waited = time.monotonic() - asked_at
            timer.join()

        assert waited > 2, "a read was answered without a lease"


def test_terms_are_granted_once() -> None:
    """A lower term, and the same term for another writer, are refused; the same pair again is answered again."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        one, other = cluster.new_writer(), cluster.new_writer()
        cluster.fence(5, one.id)
        cluster.fence(5, one.id)

        for term, writer in ((4, one), (4, other), (5, other)):
            refused = cluster.fence(term, writer.id, check=False)
            assert refused.returncode != 0, f"term {term} was given to another writer"


def test_an_agent_without_a_grant_waits() -> None:
    """An agent never raises its own term: without a grant there is no PostgreSQL."""
    with LocalCluster() as cluster:
        writer = cluster.new_writer()
        writer.start()
        hold(2)

        assert writer.state() == "waiting_for_grant"
        assert writer.postgres_pids() == []


def test_an_absent_safekeeper_catches_up_after_recycling_and_a_new_writer() -> None:
    """It lacks WAL that the first writer has recycled and the second never had: it comes from a peer."""
    parameters = {"max_wal_size": "64MB", "min_wal_size": "32MB"}
    with LocalCluster() as cluster:
        cluster.expect_log("WARN", "ERROR.*fenced")
        writer = cluster.start_writer(parameters)
        away = cluster.safekeepers[2]
        away.kill()
        Pgbench.initialise(writer.dsn(), scale=15)
        with writer.connect() as connection:
            create_table(connection)
            for _ in range(3):
                connection.execute("create table churn as select n, repeat('x', 500) from generate_series(1, 60000) n")
                connection.execute("drop table churn")
                connection.execute("checkpoint")
        first = cluster.safekeepers[0]
        begin = lsn_of(first.log_status()["start_lsn"])
        oldest = min(path.name for path in (writer.pgdata / "pg_wal").glob("0*") if len(path.name) == 24)
        assert oldest > "000000010000000000000004", f"the writer still has {oldest}: the test proves nothing"

        writer.process.kill()
        successor = cluster.start_writer(parameters)
        away.start()
        end = cluster.wait_caught_up(120)

        assert end - begin > 100 << 20
        assert assert_safekeepers_equal(cluster, begin, end) == end - begin
        assert assert_files_equal(cluster, successor.pgdata / "pg_wal", begin, end, whole=False) > 0


def test_a_new_empty_member_takes_the_place_of_a_lost_one() -> None:
    """Its machine is gone for good; a membership change admits an empty one, which then holds the whole log and votes."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = start(cluster)
        Pgbench.initialise(writer.dsn(), scale=2)
        lost = cluster.safekeepers.pop(1)
        lost.kill()
        added = cluster.add_safekeeper()
        added.start()

        with Inserters(writer.dsn) as inserters:
            wait_for("100 acknowledgements", lambda: inserters.count() >= 100)
            members = ",".join(str(safekeeper.member) for safekeeper in cluster.safekeepers)
            cluster.command(
                "membership", "change", *cluster.safekeeper_arguments(), *cluster.log_arguments(), "--to", members
            )
            wait_for("the new member to hold the log", lambda: added.log_status()["flush_lsn"] != "0/0")
            wait_for("100 acknowledgements", lambda: inserters.count() >= 200)
            cluster.safekeepers[0].kill()
            wanted = inserters.count() + 100
            wait_for("commits that need the new member", lambda: inserters.count() >= wanted)
            cluster.safekeepers[0].start()
        with writer.connect() as connection:
            assert inserters.ids() <= stored_ids(connection)
        end = cluster.wait_caught_up()
        begin = lsn_of(cluster.safekeepers[0].log_status()["start_lsn"])
        assert assert_safekeepers_equal(cluster, begin, end) > 10 << 20
