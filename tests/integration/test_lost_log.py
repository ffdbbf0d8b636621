"""A disk that has lost a log may not vote with an empty one in its place."""

import shutil

from lakebase_testing.clients import Inserters, create_table, stored_ids
from lakebase_testing.cluster import LocalCluster
from lakebase_testing.waiting import wait_for


def test_a_log_that_a_disk_has_lost_is_not_created_there_again() -> None:
    """`lakebase log create` may be repeated. Had it given an empty log to a member that acknowledged commits, that member and one
    that was away would have elected a log without them."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        losing, holding, away = cluster.safekeepers
        writer = cluster.start_writer()
        with writer.connect() as connection:
            create_table(connection)
        away.kill()
        with Inserters(writer.dsn) as inserters:
            wait_for("100 acknowledgements", lambda: inserters.count() >= 100)
        writer.process.kill()
        losing.kill()
        shutil.rmtree(losing.data / "logs" / cluster.id)
        losing.start()
        away.start()

        arguments = [
            *cluster.safekeeper_arguments(),
            *cluster.log_arguments(),
            "--base-backup",
            str(cluster.base_backup),
        ]
        created = cluster.command("log", "create", *arguments, check=False)

        assert created.returncode != 0
        assert "has held the log before" in created.stdout + created.stderr
        holding.kill()
        cluster.term += 1
        assert cluster.fence(cluster.term, writer.id, check=False).returncode != 0
        holding.start()
        successor = cluster.start_writer()
        with successor.connect() as connection:
            assert inserters.ids() <= stored_ids(connection)
