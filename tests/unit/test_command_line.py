"""The command line of the control plane promises nothing that it does not have."""

import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "lakebase_operator", *arguments], capture_output=True, text=True, check=False
    )


def test_version_is_printed() -> None:
    """Support asks for it first."""
    result = run("--version")

    assert result.returncode == 0
    assert result.stdout.startswith("lakebase-operator 0.")


def test_no_subcommand_is_an_error_that_names_the_way_out() -> None:
    """Status 2, so that a script does not take the help text for success."""
    result = run()

    assert result.returncode == 2
    assert "docs/operating.md" in result.stdout


def test_unknown_arguments_are_refused() -> None:
    """A typo never starts anything."""
    assert run("reconcile").returncode == 2
