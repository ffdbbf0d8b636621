"""PostgreSQL's own regression suite passes on a server under the agent: all tests of the parallel schedule, none left out."""

import pytest

from lakebase_testing.cluster import LocalCluster
from lakebase_testing.suites import PARAMETERS, assert_passes, run_suite


@pytest.mark.timeout(1500)
def test_the_parallel_schedule_passes() -> None:
    """pg_regress against the writer's port."""
    with LocalCluster(segment_mib=64) as cluster:
        writer = cluster.start_writer({**PARAMETERS, "shared_buffers": "256MB"})
        run = run_suite("regress", cluster.directory / "regress", ["--host=127.0.0.1", f"--port={writer.port}"])
        assert_passes(
            "regress",
            run,
            lambda: run_suite(
                "regress", cluster.directory / "stock", [f"--temp-instance={cluster.directory}/stock/server"]
            ),
        )
