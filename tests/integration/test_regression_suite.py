"""PostgreSQL's own regression suite passes on a server under the agent, and page servers have every block that it wrote."""

import re
import subprocess
from pathlib import Path

import pytest

from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import environment
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.suites import PARAMETERS, assert_passes, run_suite

# The resource manager that knows the pages of an access method, by its handler (access/rmgrlist.h); others use generic records.
_RESOURCE_MANAGERS = {
    "heap_tableam_handler": 10, "bthandler": 11, "hashhandler": 12, "ginhandler": 13, "gisthandler": 14, "spghandler": 16,
    "brinhandler": 17,
}  # fmt: skip
_SEQUENCE = 15
_GENERIC = 20


def page_kinds(writer: Writer, path: Path) -> int:
    """Writes which relation file has which kind of pages; returns how many there are."""
    with writer.connect() as connection:
        databases = [str(row[0]) for row in connection.execute("select datname from pg_database where datallowconn")]
    lines: set[str] = set()
    for database in databases:
        with writer.connect(database) as connection:
            rows = connection.execute(
                "select pg_relation_filepath(c.oid), coalesce(a.amhandler::text, ''), c.relkind::text from pg_class c"
                " left join pg_am a on a.oid = c.relam"
                " where pg_relation_filepath(c.oid) is not null and c.relpersistence = 'p' and c.reltablespace in (0, 1664)"
            ).fetchall()
        for file, handler, kind in rows:
            rmgr = _SEQUENCE if kind == "S" else _RESOURCE_MANAGERS.get(str(handler), _GENERIC)
            lines.add(f"{file} {rmgr}")
    path.write_text("\n".join(sorted(lines)) + "\n")
    return len(lines)


@pytest.mark.timeout(1500)
def test_the_parallel_schedule_passes() -> None:
    """pg_regress against the writer's port, nothing left out; then an export, which takes every block from page servers."""
    with LocalCluster(segment_mib=64, page_service=PageServiceSettings(shards=4)) as cluster:
        writer = cluster.start_writer({**PARAMETERS, "shared_buffers": "256MB"})
        run = run_suite("regress", cluster.directory / "regress", ["--host=127.0.0.1", f"--port={writer.port}"])
        assert_passes(
            "regress",
            run,
            lambda: run_suite(
                "regress", cluster.directory / "stock", [f"--temp-instance={cluster.directory}/stock/server"]
            ),
        )
        kinds = cluster.directory / "kinds"
        relations = page_kinds(writer, kinds)
        writer.stop_cleanly()
        export = cluster.directory / "export"
        cluster.export(export)

        compare = environment().lakebase.parent / "examples" / "compare_pages"
        result = subprocess.run([compare, export, writer.pgdata, kinds], capture_output=True, text=True, check=False)

        print(result.stdout)
        assert result.returncode == 0, result.stdout + result.stderr
        counted = re.search(r"^(\d+) blocks compared, (\d+) identical", result.stdout, re.MULTILINE)
        assert counted is not None
        assert int(counted[1]) > 5000 < relations * 5, result.stdout
