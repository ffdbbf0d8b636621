"""PostgreSQL's own suites pass where every page may have to come from page servers.

Four shards and few shared buffers. Once with a small cache, so that blocks are evicted and fetched again; once with no clean
block ever kept and page servers that lag at random. Afterwards a compute that starts on an empty disk has the same contents.
"""

import difflib
import os
import re
import subprocess
from dataclasses import replace

import pytest

from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import environment
from lakebase_testing.page_service import ObjectStorage, PageServiceSettings
from lakebase_testing.postgres import amcheck
from lakebase_testing.suites import PARAMETERS, Suite, assert_passes, run_suite

SMALL_CACHE = PageServiceSettings(shards=4, cache_bytes=64 << 20)
NO_CACHE = PageServiceSettings(shards=4, evict="always", ingest_delay_ms=20)


# Up to 32 values of a sequence are logged ahead: a start without the writer's memory goes on behind them.
_SEQUENCE = re.compile(r"^(SELECT pg_catalog.setval\('.*', )-?\d+(, (true|false)\);)$")


def dump(writer: Writer) -> list[str]:
    """Everything that outlives a server, as lines of SQL: not the contents of unlogged tables, nor where sequences stand."""
    result = subprocess.run(
        [
            str(environment().postgres_bin / "pg_dumpall"), "--host=127.0.0.1", f"--port={writer.port}",
            "--username=postgres", "--no-unlogged-table-data",
        ],
        capture_output=True,
        check=True,
    )  # fmt: skip
    # A random word against injection by psql's meta-commands is another one in each dump.
    return [
        _SEQUENCE.sub(r"\1?\2", line)
        for line in result.stdout.decode(errors="surrogateescape").splitlines()
        if not line.startswith(("\\restrict", "\\unrestrict"))
    ]


# All four ways are a matter of ten minutes: `make soak` runs the two others. With no clean block kept a sequence's page is
# fetched again after values that are not logged one by one, and goes on behind the 32 that are logged ahead: the regression
# suite's test of sequences may notice (`last_value` 33 instead of 2), as it would after a restart.
EVERY_DAY = [("regress", SMALL_CACHE, "s3"), ("isolation", SMALL_CACHE, "s3")]
LONG = [("regress", NO_CACHE, "file"), ("isolation", NO_CACHE, "file")]
WAYS = EVERY_DAY + LONG if os.environ.get("LAKEBASE_SOAK") else EVERY_DAY


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("suite", "settings", "storage"),
    WAYS,
    ids=[f"{suite}, {'no clean block kept' if settings is NO_CACHE else 'small cache'}" for suite, settings, _ in WAYS],
    indirect=["storage"],
)
def test_the_suite_passes(suite: Suite, settings: PageServiceSettings, storage: ObjectStorage) -> None:
    """The answers are those of a server with all its pages on its disk, and nothing is lost on the way."""
    with LocalCluster(segment_mib=64, page_service=replace(settings, object_storage=storage)) as cluster:
        if settings.ingest_delay_ms:
            cluster.expect_log("WAL is delayed at random, for a test")
        writer = cluster.start_writer({**PARAMETERS, "shared_buffers": "16MB"})
        run = run_suite(suite, cluster.directory / suite, ["--host=127.0.0.1", f"--port={writer.port}"])
        assert_passes(
            suite,
            run,
            lambda: run_suite(
                suite, cluster.directory / "stock", [f"--temp-instance={cluster.directory}/stock/server"]
            ),
        )
        before = dump(writer)
        writer.process.kill()

        successor = cluster.start_writer({**PARAMETERS, "shared_buffers": "16MB"})

        differences = list(difflib.unified_diff(before, dump(successor), lineterm="", n=1))
        assert differences == [], "\n".join(differences[:200])
        with successor.connect() as connection:
            databases = [
                str(row[0])
                for row in connection.execute("select datname from pg_database where datallowconn").fetchall()
            ]
        amcheck(successor.port, databases)
