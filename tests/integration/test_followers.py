"""Anyone entitled follows the log with ordinary tools, and sees committed WAL only."""

import base64
import hashlib
import hmac
import os
import shutil
from typing import cast

import psycopg
import pytest

from lakebase_testing.admin import Json
from lakebase_testing.clients import Inserters, create_table, stored_ids
from lakebase_testing.cluster import LocalCluster, Safekeeper, lsn_of
from lakebase_testing.environment import scratch
from lakebase_testing.followers import Receiver, standby, wait_replayed
from lakebase_testing.postgres import promoted_backup, quote_conninfo, run_as_postgres
from lakebase_testing.waiting import hold, wait_for
from lakebase_testing.wal import assert_files_equal


def test_followers_follow_across_changes_of_the_writer() -> None:
    """pg_receivewal and a stock standby, attached to the first writer's log, go on with the third's."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN", "ERROR.*fenced")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
        receiver, follower = Receiver(cluster), standby(cluster)
        receiver.start()
        follower.start()
        current = [writer]
        with Inserters(lambda: current[0].dsn()) as inserters:
            for _ in range(2):
                wanted = inserters.count() + 100
                wait_for("100 acknowledgements", lambda wanted=wanted: inserters.count() >= wanted)
                current[0].process.kill()
                current[0] = cluster.start_writer()
            wanted = inserters.count() + 100
            wait_for("100 acknowledgements", lambda: inserters.count() >= wanted)
        end = cluster.wait_caught_up()

        wait_replayed(follower, end)
        with follower.connect() as connection:
            assert inserters.ids() <= stored_ids(connection)
        receiver.wait_stored(end)
        start = lsn_of(cluster.safekeepers[0].log_status()["start_lsn"])
        assert assert_files_equal(cluster, receiver.directory, start, end, whole=True) == end - start
        follower.stop()
        receiver.stop()


@pytest.mark.parametrize("promotions", [1, 2])
def test_a_log_begins_with_its_segment_where_the_base_backup_was_promoted_in_it(promotions: int) -> None:
    """The segment begins on timeline 1, the backup ends on a later one: the log has both, and whoever follows gets all of it.

    Once, the log was created with the timeline of the backup's checkpoint, and the first page was refused as older than the log.
    """
    directory = scratch("promoted")
    with LocalCluster(backup=promoted_backup(directory, promotions)) as cluster:
        cluster.expect_log("WARN", "ERROR.*fenced")
        start = lsn_of(cluster.safekeepers[0].log_status()["start_lsn"])
        assert cluster.safekeepers[0].log_status()["timeline"] == 1
        before_the_writer, behind_the_writer = Receiver(cluster, "early"), Receiver(cluster, "late")
        before_the_writer.start()
        writer = cluster.start_writer()
        behind_the_writer.start()
        follower = standby(cluster)
        follower.start()
        with writer.connect() as connection:
            create_table(connection)
            connection.execute("insert into acknowledged select id, '' from generate_series(1, 1000) id")
        timelines = cast("list[Json]", cluster.safekeepers[0].log_status()["timelines"])
        assert [timeline["timeline"] for timeline in timelines] == [1, promotions + 1]
        assert start < lsn_of(timelines[1]["start_lsn"]) < start + cluster.segment_bytes

        # Replays the backup's own timeline from the safekeepers, and begins the next.
        writer.process.kill()
        writer = cluster.start_writer()
        with writer.connect() as connection:
            assert len(stored_ids(connection)) == 1000
            connection.execute("insert into acknowledged values (1001, '')")
        end = cluster.wait_caught_up()
        wait_replayed(follower, end)
        with follower.connect() as connection:
            assert len(stored_ids(connection)) == 1001
        for receiver in (before_the_writer, behind_the_writer):
            receiver.wait_stored(end)
            assert assert_files_equal(cluster, receiver.directory, start, end, whole=True) == end - start
            receiver.stop()
        follower.stop()
    shutil.rmtree(directory)


def test_followers_see_committed_wal_only() -> None:
    """What one safekeeper has and no majority has is served to nobody: it may still be undone by another writer."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
        left = cluster.safekeepers[0]
        follower = standby(cluster, safekeepers=[left])
        follower.start()
        wait_replayed(follower, cluster.wait_caught_up())
        for safekeeper in cluster.safekeepers[1:]:
            safekeeper.process.freeze()
        with Inserters(writer.dsn, threads=2) as inserters:
            wait_for("WAL that only one has", lambda: lsn_of(left.log_status()["flush_lsn"]) > committed(left))
            hold(2)
            assert follower.replayed() <= committed(left)
            with follower.connect() as connection:
                assert stored_ids(connection) <= inserters.ids()

            for safekeeper in cluster.safekeepers[1:]:
                safekeeper.process.thaw()
            wait_for("commits to go on", lambda: inserters.count() >= 50)
        wait_replayed(follower, cluster.wait_caught_up())
        with follower.connect() as connection:
            assert inserters.ids() <= stored_ids(connection)
        follower.stop()


def committed(safekeeper: Safekeeper) -> int:
    """What a safekeeper knows to be committed."""
    return lsn_of(safekeeper.log_status()["commit_lsn"])


def test_the_port_speaks_postgresql() -> None:
    """IDENTIFY_SYSTEM as psql sends it, over TLS with a follower's certificate."""
    with LocalCluster() as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            row = connection.execute("select system_identifier::text from pg_control_system()").fetchone()
        assert row is not None
        parameters = cluster.replication_parameters(cluster.follower(), cluster.safekeepers[0])

        result = run_as_postgres(
            "psql", "-At", "-c", "IDENTIFY_SYSTEM", f"{quote_conninfo(parameters)} replication=true"
        )

        assert result.stdout.split("|")[:2] == [row[0], "1"]


def scram_verifier(password: str) -> str:
    """The verifier as PostgreSQL writes it (RFC 5803)."""
    salt, rounds = os.urandom(16), 4096
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, rounds)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    text = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${rounds}:{text[0]}${text[1]}:{text[2]}"


@pytest.mark.parametrize(("password", "accepted"), [("correct", True), ("wrong", False)])
def test_a_password_is_enough_where_there_is_no_certificate(password: str, accepted: bool) -> None:
    """SCRAM-SHA-256 against the users file; a wrong one is refused with PostgreSQL's words."""
    cluster = LocalCluster()
    (cluster.directory / "users").write_text(f"archiver:{scram_verifier('correct')}\n")
    with cluster:
        cluster.expect_log("WARN.*(password|authentication)")
        assert cluster.authority is not None
        (cluster.authority.directory).chmod(0o755)
        parameters = {
            **cluster.replication_parameters(None, cluster.safekeepers[0]),
            "user": "archiver",
            "sslmode": "verify-full",
            "sslrootcert": str(cluster.authority.directory / "ca.pem"),
        }
        result = run_as_postgres(
            "psql", "-At", "-c", "IDENTIFY_SYSTEM", f"{quote_conninfo(parameters)} replication=true",
            check=False, env={"PGPASSWORD": password},
        )  # fmt: skip

        assert (result.returncode == 0) is accepted, result.stderr
        if not accepted:
            assert "password authentication failed" in result.stderr


def test_without_tls_nobody_is_let_in() -> None:
    """Plain text is refused with an error that says what to do."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        parameters = {**cluster.replication_parameters(None, cluster.safekeepers[0]), "sslmode": "disable"}
        with pytest.raises(psycopg.OperationalError, match=r"TLS|SSL|encrypt"):
            psycopg.connect(quote_conninfo(parameters), replication="true")


def test_statements_that_are_no_replication_commands_are_refused() -> None:
    """A safekeeper is no database: SELECT gets an error, and the connection survives it."""
    with LocalCluster() as cluster:
        parameters = cluster.replication_parameters(cluster.follower(), cluster.safekeepers[0])
        refused = run_as_postgres(
            "psql", "-At", "-c", "select 1", f"{quote_conninfo(parameters)} replication=true", check=False
        )

        assert refused.returncode != 0
        assert "ERROR" in refused.stderr
