"""An S3 server for tests: the one that the environment names, or one that this run starts and ends."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from lakebase_testing.environment import scratch
from lakebase_testing.ports import free_port

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "s3-server"
_started: list[Path] = []


@cache
def s3_url() -> str | None:
    """Returns the URL of a bucket, with what reaches it in this process's environment; None where no server can be had.

    LAKEBASE_TEST_S3_URL and AWS_* of the environment come first; without them `scripts/s3-server` builds and starts one,
    which needs Go.
    """
    if url := os.environ.get("LAKEBASE_TEST_S3_URL"):
        return url
    if shutil.which("go") is None:
        return None
    directory = scratch("s3")
    # A port of its own: other runs have theirs.
    environment = {**os.environ, "LAKEBASE_S3_PORT": str(free_port())}
    command = [str(SCRIPT), "start", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, env=environment)
    assert result.returncode == 0, f"{SCRIPT}: {result.stdout}{result.stderr}"
    _started.append(directory)
    for line in result.stdout.splitlines():
        name, _, setting = line.removeprefix("export ").partition("=")
        os.environ[name] = setting
    return os.environ["LAKEBASE_TEST_S3_URL"]


def own_s3() -> Path | None:
    """Returns the directory of the server that this run started, if it did."""
    return _started[-1] if _started else None


def end_s3() -> None:
    """Ends the server that this run started, if it did."""
    while _started:
        directory = _started.pop()
        subprocess.run([str(SCRIPT), "stop", str(directory)], capture_output=True, check=True, timeout=60)
        shutil.rmtree(directory)
