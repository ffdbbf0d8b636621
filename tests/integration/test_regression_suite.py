"""PostgreSQL's own regression suite passes on a server under the agent: all tests of the parallel schedule, none left out.

Where the suite is of another minor release than the server (a mirror may lack the newest source), some expected files are
not this server's. Then the same server without our library says what is expected: the tests that differ must be the
same ones, with the same output.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lakebase_testing.cluster import LocalCluster
from lakebase_testing.environment import environment, give_to_postgres, is_root

# PostgreSQL 17.11 has 225; a shorter schedule means that somebody cut it.
_TESTS_MIN = 220


@dataclass(frozen=True)
class Run:
    """What pg_regress said, and where the results are."""

    passed: list[str]
    failed: list[str]
    results: Path
    shown: str


def scheduled() -> list[str]:
    """The tests of the parallel schedule, in order."""
    text = (environment().postgres_tests / "regress" / "parallel_schedule").read_text()
    return [
        name for line in text.splitlines() if line.startswith("test:") for name in line.removeprefix("test:").split()
    ]


def regress(out: Path, server: list[str]) -> Run:
    """Runs the parallel schedule on a server: arguments that name one, or that make pg_regress start its own."""
    suite = environment().postgres_tests / "regress"
    out.mkdir()
    give_to_postgres(out)
    result = subprocess.run(
        [
            str(suite / "pg_regress"), f"--bindir={environment().postgres_bin}", *server, "--user=postgres",
            f"--inputdir={suite}", f"--expecteddir={suite}", f"--dlpath={suite}", f"--outputdir={out}",
            "--max-concurrent-tests=20", f"--schedule={suite}/parallel_schedule",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=1400,
        cwd=out,
        user=environment().postgres_user if is_root() else None,
    )  # fmt: skip
    differences = out / "regression.diffs"
    shown = differences.read_text(errors="replace")[:20_000] if differences.exists() else result.stdout[-4000:]
    return Run(
        passed=re.findall(r"^ok \d+\s+[+-] (\S+)", result.stdout, re.MULTILINE),
        failed=re.findall(r"^not ok \d+\s+[+-] (\S+)", result.stdout, re.MULTILINE),
        results=out / "results",
        shown=shown + result.stderr,
    )


def is_of_this_server() -> bool:
    """Whether the suite is of the server's own minor release; one that does not say so lies beside its server."""
    version_file = environment().postgres_tests / "VERSION"
    if not version_file.exists():
        return True
    version = version_file.read_text().strip()
    postgres = environment().postgres_bin / "postgres"
    server = subprocess.run([str(postgres), "--version"], capture_output=True, text=True, check=True).stdout
    return version in server.split()


@pytest.mark.timeout(1500)
def test_the_parallel_schedule_passes() -> None:
    """pg_regress against the writer's port; the list of tests that ran is the list of the schedule."""
    with LocalCluster(segment_mib=64) as cluster:
        writer = cluster.start_writer(
            {"max_prepared_transactions": "2", "wal_level": "logical", "shared_buffers": "256MB"}
        )
        run = regress(cluster.directory / "regress", ["--host=127.0.0.1", f"--port={writer.port}"])
        print(f"{len(run.passed)} passed, {len(run.failed)} failed: {run.failed}")
        if run.failed and not is_of_this_server():
            stock = regress(cluster.directory / "stock", [f"--temp-instance={cluster.directory}/stock/server"])
            print(f"without the library: {len(stock.passed)} passed, {len(stock.failed)} failed: {stock.failed}")
            assert len(stock.passed) >= _TESTS_MIN - 20, stock.shown
            for name in run.failed:
                assert name in stock.failed, f"{name}\n{run.shown}"
                ours, theirs = ((results / f"{name}.out").read_bytes() for results in (run.results, stock.results))
                assert ours == theirs, f"{name} differs from the server without our library\n{run.shown}"
        else:
            assert run.failed == [], f"{run.failed}\n{run.shown}"
        assert len(run.passed) + len(run.failed) >= _TESTS_MIN, run.shown
        assert sorted(run.passed + run.failed) == sorted(scheduled())
