"""PostgreSQL's own test suites against any server, and how their results are judged.

Where the suites are of another minor release than the server (a mirror may lack the newest source), some expected files
are not this server's. Then the same server without our library says what is expected: the tests that differ must be the
same ones, with the same output.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lakebase_testing.environment import environment, give_to_postgres, is_root

Suite = Literal["regress", "isolation"]

# PostgreSQL 17.11 has 225 and 121; a shorter schedule means that somebody cut it.
_TESTS_MIN = {"regress": 220, "isolation": 115}
_TIMEOUT_SECONDS = 1400
# What both suites need of a server.
PARAMETERS = {"max_prepared_transactions": "2", "wal_level": "logical"}


@dataclass(frozen=True)
class Run:
    """What the suite's driver said, and where the results are."""

    passed: list[str]
    failed: list[str]
    results: Path
    shown: str


def scheduled(suite: Suite) -> list[str]:
    """The tests of the suite's schedule, in order."""
    name = "parallel_schedule" if suite == "regress" else "isolation_schedule"
    text = (environment().postgres_tests / suite / name).read_text()
    return [
        name for line in text.splitlines() if line.startswith("test:") for name in line.removeprefix("test:").split()
    ]


def run_suite(suite: Suite, out: Path, server: list[str]) -> Run:
    """Runs the whole schedule on a server: arguments that name one, or that make the driver start its own."""
    directory = environment().postgres_tests / suite
    out.mkdir()
    give_to_postgres(out)
    common = [
        f"--bindir={environment().postgres_bin}", *server, "--user=postgres", f"--inputdir={directory}",
        f"--expecteddir={directory}", f"--outputdir={out}",
    ]  # fmt: skip
    if suite == "regress":
        command = [
            str(directory / "pg_regress"), *common, f"--dlpath={directory}", "--max-concurrent-tests=20",
            f"--schedule={directory}/parallel_schedule",
        ]  # fmt: skip
    else:
        command = [str(directory / "pg_isolation_regress"), *common, f"--schedule={directory}/isolation_schedule"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_SECONDS,
        cwd=out,
        user=environment().postgres_user if is_root() else None,
    )
    differences = out / "regression.diffs"
    shown = differences.read_text(errors="replace")[:20_000] if differences.exists() else result.stdout[-4000:]
    return Run(
        passed=re.findall(r"^ok \d+\s+[+-] (\S+)", result.stdout, re.MULTILINE),
        failed=re.findall(r"^not ok \d+\s+[+-] (\S+)", result.stdout, re.MULTILINE),
        results=out / "results",
        shown=shown + result.stderr,
    )


def is_of_this_server() -> bool:
    """Whether the suites are of the server's own minor release; ones that do not say so lie beside their server."""
    version_file = environment().postgres_tests / "VERSION"
    if not version_file.exists():
        return True
    version = version_file.read_text().strip()
    postgres = environment().postgres_bin / "postgres"
    server = subprocess.run([str(postgres), "--version"], capture_output=True, text=True, check=True).stdout
    return version in server.split()


def assert_passes(suite: Suite, run: Run, stock: Callable[[], Run]) -> None:
    """The run is what a server without our library gives; the list of tests that ran is the list of the schedule.

    `stock` makes the run that is compared with where expected files are of another minor release.
    """
    print(f"{suite}: {len(run.passed)} passed, {len(run.failed)} failed: {run.failed}")
    if run.failed and not is_of_this_server():
        theirs = stock()
        print(f"{suite} without the library: {len(theirs.passed)} passed, {len(theirs.failed)} failed: {theirs.failed}")
        assert len(theirs.passed) >= _TESTS_MIN[suite] - 20, theirs.shown
        for name in run.failed:
            assert name in theirs.failed, f"{name}\n{run.shown}"
            outputs = [(results / f"{name}.out").read_bytes() for results in (run.results, theirs.results)]
            assert outputs[0] == outputs[1], f"{name} differs from the server without our library\n{run.shown}"
    else:
        assert run.failed == [], f"{run.failed}\n{run.shown}"
    assert len(run.passed) + len(run.failed) >= _TESTS_MIN[suite], run.shown
    assert sorted(run.passed + run.failed) == sorted(scheduled(suite))
