"""PostgreSQL's own suites pass where every page may have to come from page servers.

Four shards and few shared buffers. Once with a small cache, so that blocks are evicted and fetched again; once with no clean
block ever kept and page servers that lag at random. Afterwards a compute that starts on an empty disk has the same contents.
"""

import difflib
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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suite", ["regress", "isolation"])
@pytest.mark.parametrize(
    ("settings", "storage"),
    [pytest.param(SMALL_CACHE, "s3", id="small cache"), pytest.param(NO_CACHE, "file", id="no clean block kept")],
    indirect=["storage"],
)
def test_the_suite_passes(suite: Suite, settings: PageServiceSettings, storage: ObjectStorage) -> None:
    """The answers are those of a server with all its pages on its disk, and nothing is lost on the way."""
    with LocalCluster(segment_mib=64, page_service=replace(settings, object_storage=storage)) as cluster:
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
