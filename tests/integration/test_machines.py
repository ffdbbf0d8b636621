"""The same cluster where io_uring is forbidden, as an ordinary user, with large segments, and without TLS."""

from collections.abc import Sequence

import pytest

from lakebase_testing.clients import Inserters, create_table, stored_ids
from lakebase_testing.cluster import LocalCluster
from lakebase_testing.environment import environment, is_root
from lakebase_testing.faults import without_io_uring
from lakebase_testing.waiting import wait_for


def smoke(cluster: LocalCluster) -> None:
    """Commits, loses a safekeeper and the writer, and finds everything with the next writer."""
    cluster.expect_log("WARN")
    writer = cluster.start_writer()
    with writer.connect() as connection:
        create_table(connection)
    current = [writer]
    with Inserters(lambda: current[0].dsn()) as inserters:
        wait_for("100 acknowledgements", lambda: inserters.count() >= 100)
        cluster.safekeepers[0].kill()
        wanted = inserters.count() + 100
        wait_for("100 more", lambda: inserters.count() >= wanted)
        current[0].process.kill()
        cluster.safekeepers[0].start()
        current[0] = cluster.start_writer()
        again = inserters.count() + 100
        wait_for("100 from the next writer", lambda: inserters.count() >= again)
    with current[0].connect() as connection:
        assert inserters.ids() <= stored_ids(connection)
    cluster.wait_caught_up()


@pytest.mark.parametrize(
    ("wrapper", "driver"), [((), "io_uring"), (without_io_uring(), "polling")], ids=["allowed", "forbidden"]
)
def test_with_io_uring_allowed_and_forbidden(wrapper: Sequence[str], driver: str) -> None:
    """The probe at the start decides, and says what it decided; a seccomp filter forbids as container runtimes do."""
    with LocalCluster(wrapper=wrapper) as cluster:
        drivers = {str(safekeeper.status()["driver"]) for safekeeper in cluster.safekeepers}
        if driver == "polling" or drivers != {"polling"}:
            assert drivers == {driver}
        smoke(cluster)


def test_as_an_ordinary_user() -> None:
    """Everything without privileges: safekeepers, agent and PostgreSQL under one unprivileged user."""
    with LocalCluster(user=environment().postgres_user if is_root() else None) as cluster:
        smoke(cluster)


def test_with_segments_of_sixty_four_megabytes() -> None:
    """The size of new clusters."""
    with LocalCluster(segment_mib=64) as cluster:
        smoke(cluster)


def test_with_tls_switched_off_on_purpose() -> None:
    """The explicit development flag."""
    with LocalCluster(tls=False) as cluster:
        smoke(cluster)


def test_with_five_safekeepers() -> None:
    """Two may be gone."""
    with LocalCluster(members=5) as cluster:
        absent = cluster.safekeepers.pop()
        absent.kill()
        smoke(cluster)
        absent.start()
        cluster.safekeepers.append(absent)
        cluster.wait_caught_up()
