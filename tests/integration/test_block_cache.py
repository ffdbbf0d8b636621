"""The writer's cache of relation blocks: its limit, reads that cannot be served, and the brake of a writer that is too fast."""

import re
from typing import cast

import psycopg
import pytest

from lakebase_testing.admin import Json
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import number
from lakebase_testing.waiting import wait_for

_MIB = 1 << 20


def used_bytes(writer: Writer) -> int:
    """What the files of relations take on the writer's disk."""
    return sum(path.stat().st_blocks * 512 for path in (writer.pgdata / "base").rglob("*") if path.is_file())


def page_service(writer: Writer, key: str) -> int:
    """A figure of what the agent says about its page service."""
    section = cast("Json", writer.status()["page_service"])
    return int(str(section[key]))


def test_a_table_larger_than_the_cache_is_read_and_written() -> None:
    """What is given back comes again, and the disk never holds much more than the limit: a pod's volume is small."""
    settings = PageServiceSettings(shards=2, cache_bytes=16 * _MIB)
    with LocalCluster(page_service=settings) as cluster:
        writer = cluster.start_writer({"shared_buffers": "1MB"})
        with writer.connect() as connection:
            connection.execute("create table t as select i, repeat('x', 400) note from generate_series(1, 150000) i")
            assert number(connection, "select pg_table_size('t')") > 4 * settings.cache_bytes
            for step in range(1, 4):
                connection.execute("update t set i = i + 1 where i % 10 = 0")
                assert number(connection, "select count(*) from t") == 150_000
                wait_for(
                    f"the cache to shrink after pass {step}",
                    lambda: used_bytes(writer) < 2 * settings.cache_bytes,
                    30,
                )
        assert writer.admin.get("/v1/status")["state"] == "running"


def test_a_page_server_that_is_away_fails_a_query_in_time_and_by_name() -> None:
    """An ordinary I/O error for that query, one line in the agent's log, and no harm to anything else (finding B13)."""
    settings = PageServiceSettings(shards=2, fill_timeout="2s")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("reads of PostgreSQL fail", "no connection to the page server", "no WAL from a safekeeper")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t as select i, repeat('x', 1000) note from generate_series(1, 20000) i")
        writer.process.kill()
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("set max_parallel_workers_per_gather = 0")
            # What the query needs beside the table comes before the page servers go.
            connection.execute("explain select count(*), sum(length(note)) from t")
            connection.execute("select count(*), sum(length('x')) from generate_series(1, 10)")
            for page_server in cluster.page_servers:
                page_server.process.freeze()
            for _ in range(2):
                with pytest.raises(psycopg.errors.IoError, match="could not read blocks"):
                    connection.execute("select count(*), sum(length(note)) from t")
            lines = [line for line in writer.process.log_text().splitlines() if "reads of PostgreSQL fail" in line]
            for page_server in cluster.page_servers:
                page_server.process.thaw()

            assert 1 <= len(lines) <= len(cluster.page_servers)
            assert all(
                re.search(r"relation 166[34]/\d+/\d+ blocks? \d+.* as of .* at 127\.0\.0\.1:", line) for line in lines
            )
            assert number(connection, "select sum(length(note)) from t") == 20_000_000
        assert page_service(writer, "failed_blocks") > 0
        wait_for("the end of the outage in the log", lambda: "answers again" in writer.process.log_text() or None, 30)


def test_a_writer_is_slowed_but_not_stopped_while_page_servers_lag() -> None:
    """Each flush takes longer, so that safekeepers do not run out of space; when they catch up it ends."""
    settings = PageServiceSettings(shards=2, ingest_lag_bytes=_MIB)
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("no connection to the page server", "no WAL from a safekeeper")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t (i int, note text)")
            insert = "insert into t values (1, repeat('x', 900))"
            connection.execute(insert)
            for page_server in cluster.page_servers:
                page_server.process.freeze()

            def slowed() -> int | None:
                for _ in range(200):
                    connection.execute(insert)
                return page_service(writer, "flush_delay_us") or None

            assert 0 < wait_for("a delay of flushes", slowed, 60) <= 10_000
            connection.execute(insert)
            for page_server in cluster.page_servers:
                page_server.process.thaw()
            wait_for("the end of the delay", lambda: page_service(writer, "flush_delay_us") == 0 or None, 60)
