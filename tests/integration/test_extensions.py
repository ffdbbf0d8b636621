"""Extensions that know nothing of a lakebase work, their indexes survive the loss of the compute. What cannot work is refused
by name, and the cluster goes on."""

import shutil
import subprocess
from pathlib import Path

import psycopg
import pytest

from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import environment, give_to_postgres
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import Connection, amcheck, number, value
from lakebase_testing.waiting import wait_for

# With their own kinds of indexes, and what a query must find by them.
_INDEXES = {
    "trigrams": ("create index {name} on words using gin (word gin_trgm_ops)", "word like '%abc%'"),
    "trigrams_gist": ("create index {name} on words using gist (word gist_trgm_ops)", "word like '%abc%'"),
    "signatures": ("create index {name} on words using bloom (i, k)", "k = 7 and i = 7"),
    "neighbours": ("create index {name} on words using hnsw (place vector_l2_ops)", None),
    "lists": ("create index {name} on words using ivfflat (place vector_l2_ops) with (lists = 10)", None),
    "ranges": ("create index {name} on words using gist (i, word)", "i between 100 and 200"),
}
_EXTENSIONS = ("pg_trgm", "bloom", "vector", "btree_gist", "pg_stat_statements", "amcheck", "pg_visibility")


def found(connection: Connection) -> dict[str, object]:
    """What queries find with each index, and without any."""
    results: dict[str, object] = {}
    # Approximate indexes that look at all candidates.
    connection.execute("set hnsw.ef_search = 1000")
    connection.execute("set ivfflat.probes = 10")
    for name, (_, condition) in _INDEXES.items():
        query = (
            f"select count(*) from words where {condition}"
            if condition
            else "select round((place <-> '[51,52,53]')::numeric, 3) from words order by place <-> '[51,52,53]' limit 1"
        )
        for scan in ("on", "off"):
            connection.execute(f"set enable_indexscan = {scan}".encode())
            connection.execute(f"set enable_bitmapscan = {scan}".encode())
            connection.execute(f"set enable_seqscan = {'off' if scan == 'on' else 'on'}".encode())
            results[f"{name} {scan}"] = value(connection, query)
        assert results[f"{name} on"] == results[f"{name} off"], f"{name}: {results}"
    return results


def change(connection: Connection, begin: int) -> None:
    """Adds rows from `begin` on and removes some of those before."""
    connection.execute(
        "insert into words select i, i %% 100, md5(i::text), "
        "array[i %% 100, i %% 90, i %% 80]::vector from generate_series(%s::int, %s::int) i",
        (begin, begin + 2000),
    )
    connection.execute("delete from words where i %% 11 = 3 and i < %s", (begin,))
    connection.execute("vacuum words")


def restarted(cluster: LocalCluster, writer: Writer, parameters: dict[str, str]) -> Writer:
    """Kills a compute and starts another on an empty disk."""
    writer.process.kill()
    return cluster.start_writer(parameters)


@pytest.mark.parametrize("evict", [False, True], ids=["cache as needed", "every block is evicted after each access"])
def test_extensions_work(evict: bool) -> None:
    """contrib's, with generic WAL among them, and pgvector, Debian's package, unchanged."""
    parameters = {"shared_preload_libraries": "pg_stat_statements"}
    if evict:
        parameters["shared_buffers"] = "2MB"
    settings = PageServiceSettings(shards=2, evict="always" if evict else "as_needed")
    with LocalCluster(page_service=settings) as cluster:
        writer = cluster.start_writer(parameters)
        with writer.connect() as connection:
            available = number(connection, "select count(*) from pg_available_extensions where name = 'vector'")
            if available == 0:
                pytest.skip("pgvector is not installed beside this PostgreSQL: postgresql-17-pgvector")
            for extension in _EXTENSIONS:
                connection.execute(f"create extension {extension}".encode())
            connection.execute("create table words (i int, k int, word text, place vector(3))")
            change(connection, 1)
            for name, (statement, _) in _INDEXES.items():
                connection.execute(statement.format(name=name).encode())
            change(connection, 10_000)
            before = found(connection)
            assert number(connection, "select count(*) from pg_stat_statements") > 0

        writer = restarted(cluster, writer, parameters)

        with writer.connect() as connection:
            assert found(connection) == before
            change(connection, 20_000)
            found(connection)
            # Bits of the visibility map that lie would make index-only scans find what was deleted.
            assert number(connection, "select count(*) from pg_check_visible('words')") == 0
        amcheck(writer.port, ["postgres"])


def test_a_tablespace_with_a_location_is_refused() -> None:
    """Its files would lie beside the virtual disk: an error for the statement, whose reason is in PostgreSQL's log."""
    with LocalCluster(page_service=PageServiceSettings(shards=1)) as cluster:
        location = cluster.directory / "elsewhere"
        location.mkdir()
        give_to_postgres(location)
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t as select generate_series(1, 1000) i")
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"pg_tblspc.*not permitted"):
                connection.execute(f"create tablespace elsewhere location '{location}'".encode())
            # On the same connection.
            assert number(connection, "select count(*) from t") == 1000
            assert number(connection, "select count(*) from pg_tablespace") == 2
            connection.execute("insert into t values (0)")
        assert "a tablespace with a location is refused" in writer.postgres_log.read_text() + writer.process.log_text()

        writer = restarted(cluster, writer, {})

        with writer.connect() as connection:
            assert number(connection, "select count(*) from t") == 1001
            assert number(connection, "select count(*) from pg_tablespace") == 2


def compile_extension(source: Path, target: Path) -> None:
    """Builds an extension in one C file against the headers of the PostgreSQL that runs."""
    config = environment().postgres_bin.parent / "usr" / "include" / "postgresql" / "17" / "server"
    command = ["cc", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", f"-I{config}", "-o", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_record_of_a_custom_resource_manager_never_enters_the_log() -> None:
    """Page servers could not apply it, so that ingest would stop for ever by one statement (finding B9): PostgreSQL restarts
    without it, whoever wrote it gets no acknowledgement, and the status names the extension's number."""
    with LocalCluster(page_service=PageServiceSettings(shards=1)) as cluster:
        cluster.expect_log("custom resource manager 128", "unsupported", "PostgreSQL ended", "without it")
        library = cluster.directory / "custom_resource_manager.so"
        compile_extension(Path(__file__).with_name("custom_resource_manager.c"), library)
        parameters = {"shared_preload_libraries": str(library)}
        writer = cluster.start_writer(parameters)
        with writer.connect() as connection:
            connection.execute("create table t as select generate_series(1, 1000) i")
            connection.execute(f"create function write_note() returns void language c as '{library}'".encode())
        attempt = writer.status()["attempt"]

        with writer.connect() as connection:
            connection.execute("begin")
            connection.execute("insert into t values (-1)")
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select write_note()")

        wait_for("another attempt", lambda: writer.status()["attempt"] != attempt, 30)
        writer.wait_running()
        assert "custom resource manager 128" in str(writer.status()["unsupported_record"])
        assert "custom resource manager 128" in writer.process.log_text()
        with writer.connect() as connection:
            connection.execute("insert into t values (0)")
            assert number(connection, "select count(*) from t") == 1001

        writer = restarted(cluster, writer, {})

        with writer.connect() as connection:
            assert number(connection, "select count(*) from t") == 1001
        assert all(server.status()["faults"] == 0 for server in cluster.page_servers)
        amcheck(writer.port, ["postgres"])
