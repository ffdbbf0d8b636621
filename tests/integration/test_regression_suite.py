"""PostgreSQL's own regression suite passes on a server under the agent: all tests of the parallel schedule, none left out."""

import re
import subprocess

import pytest

from lakebase_testing.cluster import LocalCluster
from lakebase_testing.environment import environment, give_to_postgres, is_root

# PostgreSQL 17.11 has 225; a shorter schedule means that somebody cut it.
_TESTS_MIN = 220


def scheduled() -> list[str]:
    """The tests of the parallel schedule, in order."""
    text = (environment().postgres_tests / "regress" / "parallel_schedule").read_text()
    return [
        name for line in text.splitlines() if line.startswith("test:") for name in line.removeprefix("test:").split()
    ]


@pytest.mark.timeout(1500)
def test_the_parallel_schedule_passes() -> None:
    """pg_regress against the writer's port; the list of tests that ran is the list of the schedule."""
    suite = environment().postgres_tests / "regress"
    with LocalCluster(segment_mib=64) as cluster:
        writer = cluster.start_writer(
            {"max_prepared_transactions": "2", "wal_level": "logical", "shared_buffers": "256MB"}
        )
        out = cluster.directory / "regress"
        out.mkdir()
        give_to_postgres(out)
        result = subprocess.run(
            [
                str(suite / "pg_regress"), f"--bindir={environment().postgres_bin}", "--host=127.0.0.1", f"--port={writer.port}",
                "--user=postgres", f"--inputdir={suite}", f"--expecteddir={suite}", f"--dlpath={suite}", f"--outputdir={out}",
                "--max-concurrent-tests=20", f"--schedule={suite}/parallel_schedule",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=1400,
            cwd=out,
            user=environment().postgres_user if is_root() else None,
        )  # fmt: skip

        passed = re.findall(r"^ok \d+\s+[+-] (\S+)", result.stdout, re.MULTILINE)
        failed = re.findall(r"^not ok \d+\s+[+-] (\S+)", result.stdout, re.MULTILINE)
        differences = out / "regression.diffs"
        shown = differences.read_text(errors="replace")[:20_000] if differences.exists() else result.stdout[-4000:]
        print(f"{len(passed)} passed, {len(failed)} failed: {failed}")
        assert failed == [], f"{failed}\n{shown}"
        assert len(passed) >= _TESTS_MIN, result.stdout + result.stderr
        assert sorted(passed) == sorted(scheduled())
