"""A database of stock PostgreSQL into a lakebase, and out of it again, as files that stock PostgreSQL starts."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from lakebase_testing.clients import Pgbench, tpcb_sums
from lakebase_testing.cluster import LocalCluster
from lakebase_testing.environment import environment, give_to_postgres, scratch
from lakebase_testing.page_service import ObjectStorage, PageServiceSettings
from lakebase_testing.postgres import (
    StockServer,
    amcheck,
    base_backup,
    copy_tree,
    format_lsn,
    number,
    run_as_postgres,
    value,
)
from lakebase_testing.waiting import wait_for


@pytest.fixture
def directory() -> Iterator[Path]:
    """A scratch directory of PostgreSQL's user, removed at the end of a test that passes."""
    path = give_to_postgres(scratch("transfer"))
    yield path
    shutil.rmtree(path)


def dump(port: int, path: Path) -> Path:
    """Writes what pg_dump says about the database to a file, without the random token that it invents for each run."""
    run_as_postgres(
        "pg_dump", "--host=127.0.0.1", f"--port={port}", "--username=postgres", "--dbname=postgres", f"--file={path}",
        # Rows of unlogged tables do not come along.
        "--no-unlogged-table-data",
    )  # fmt: skip
    subprocess.run(["sed", "-i", r"/^\\\(un\)\?restrict /d", str(path)], check=True)
    return path


def assert_same(one: Path, other: Path) -> None:
    """Asserts that two dumps are equal to the byte, and shows how they begin to differ."""
    result = subprocess.run(["diff", str(one), str(other)], stdout=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 0, f"{one} {other}: {result.stdout[:2000]}"


# Of pgbench; `make soak` sets 100, which is 1.5 GB.
_SCALE = int(os.environ.get("LAKEBASE_TRANSFER_SCALE", "3"))


def stock_database(directory: Path, scale: int = _SCALE) -> tuple[Path, Path]:
    """A stopped PGDATA with pgbench's tables, other kinds of indexes, a second database; and its dump."""
    server = StockServer.create(directory, base_backup())
    server.start()
    Pgbench.initialise(server.dsn(), scale=scale)
    with server.connect() as connection:
        connection.execute("create unlogged table u as select generate_series(1, 1000) i")
        connection.execute("create table words as select i, md5(i::text) word from generate_series(1, 5000) i")
        connection.execute("create index on words using gin (to_tsvector('simple', word))")
        connection.execute("create index on words using hash (word)")
        connection.execute("create index on words using brin (i)")
        connection.execute("vacuum words")
        connection.execute("delete from words where i % 7 = 0")
        connection.execute("create database second")
    with server.connect("second") as connection:
        connection.execute("create table only_here as select generate_series(1, 10) i")
    run_as_postgres("pgbench", "--client=2", "--transactions=200", "--no-vacuum", server.dsn())
    text = dump(server.port, directory / "stock.sql")
    server.stop()
    return server.data, text


def start_exported(directory: Path, exported: Path) -> StockServer:
    """Checks an exported PGDATA and starts a copy of it without any library of ours."""
    run_as_postgres("pg_checksums", "--check", "--pgdata", str(exported))
    directory.mkdir()
    server = StockServer.create(directory, exported)
    server.start()
    return server


@pytest.mark.parametrize(("storage", "shards"), [("file", 1), ("file", 4), ("s3", 2)], indirect=["storage"])
def test_a_database_goes_in_and_comes_out(directory: Path, storage: ObjectStorage, shards: int) -> None:
    """pg_dump of the stock server, of the lakebase, and of the export agree; checksums and indexes are sound."""
    backup, expected = stock_database(directory)
    settings = PageServiceSettings(shards=shards, object_storage=storage)
    with LocalCluster(page_service=settings, backup=backup) as cluster:
        writer = cluster.start_writer()
        assert_same(expected, dump(writer.port, directory / "imported.sql"))
        amcheck(writer.port, ["postgres"])
        with writer.connect() as connection:
            # Transactions whose ids no counter on a page server knows yet when the export reads it.
            for i in range(50):
                connection.execute("insert into words values (%s, 'after the import')", (-i,))
            assert number(connection, "select count(*) from u") == 0
        changed = dump(writer.port, directory / "changed.sql")
        writer.stop_cleanly()
        end = cluster.wait_caught_up()

        cluster.export(directory / "exported", "--at", format_lsn(end))

    server = start_exported(directory / "stock", directory / "exported")
    try:
        assert_same(changed, dump(server.port, directory / "exported.sql"))
        assert "after the import" in changed.read_text()
        amcheck(server.port, ["postgres", "second"])
        with server.connect() as connection:
            assert len(tpcb_sums(connection)) == 1
            connection.execute("insert into words values (-100, 'goes on')")
            connection.execute("checkpoint")
    finally:
        server.stop()


def test_an_export_goes_back_in_time_and_in_again(directory: Path) -> None:
    """The documented way back before branches exist: export as of a position or a time, import as a new lakebase."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t as select generate_series(1, 1000) i")
            lsn = str(value(connection, "select pg_current_wal_insert_lsn()"))
            timestamp = str(value(connection, "select clock_timestamp()"))
            connection.execute("select pg_sleep(0.1)")
            connection.execute("drop table t")
            connection.execute("create table later (i int)")

        for name, at in (("lsn", lsn), ("timestamp", timestamp)):
            cluster.export(directory / name, "--at", at)
    server = start_exported(directory / "stock", directory / "timestamp")
    try:
        with server.connect() as connection:
            assert number(connection, "select count(*) from t") == 1000
            assert value(connection, "select to_regclass('later')") is None
    finally:
        server.stop()

    with LocalCluster(page_service=PageServiceSettings(shards=1), backup=directory / "lsn") as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            assert number(connection, "select count(*) from t") == 1000
            connection.execute("insert into t values (0)")


def test_a_position_that_cannot_be_exported_is_refused(directory: Path) -> None:
    """Before the import there is no history, behind the end no pages yet, and nothing half-written is left."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        for at, reason in (("0/10", "history"), ("FF/0", "not there yet")):
            refused = cluster.export(directory / "exported", "--at", at, check=False)
            assert refused.returncode == 1
            assert reason in refused.stderr, refused.stderr
            assert not (directory / "exported").exists()
        (directory / "taken").mkdir()
        (directory / "taken" / "file").touch()
        refused = cluster.export(directory / "taken", check=False)
        assert refused.returncode == 1
        assert "not empty" in refused.stderr
        assert (directory / "taken" / "file").exists()


def import_command(pgdata: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs `lakebase import` into a local directory."""
    line = [
        str(environment().lakebase), "import", "--from-pgdata", str(pgdata), "--object-storage", f"file://{target}",
        *options,
    ]  # fmt: skip
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)


def clusters(target: Path) -> list[Path]:
    """The descriptions of lakebases in an object storage directory."""
    return list(target.glob("**/cluster.json"))


def test_an_import_describes_the_cluster(directory: Path) -> None:
    """cluster.json says what the other commands need; a second import under the name is refused and changes nothing."""
    identity = ["--cluster", "00010203-0405-0607-0809-0a0b0c0dfeff", "--branch", "10010203-0405-0607-0809-0a0b0c0dfeff"]
    done = import_command(base_backup(), directory / "objects", *identity, "--shards", "3")
    assert done.returncode == 0, done.stderr
    (path,) = clusters(directory / "objects")
    before = path.read_text()
    description = json.loads(before)
    assert description["cluster"] == identity[1]
    assert [shard["shard"] for shard in description["shards"]] == [0, 1, 2]
    assert description["checksums"] is True

    again = import_command(base_backup(), directory / "objects", *identity)

    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert path.read_text() == before


def test_what_cannot_be_imported_is_refused_with_what_to_do(directory: Path) -> None:
    """Each refusal says what is wrong and what to do about it, and leaves nothing that looks like a lakebase."""

    def refused(name: str, *expected: str) -> None:
        result = import_command(directory / name, directory / "objects")
        assert result.returncode == 1, f"{name}: {result.stdout}"
        for part in expected:
            assert part in result.stderr, f"{name}: {result.stderr}"
        assert not clusters(directory / "objects")

    def copy(name: str) -> Path:
        return copy_tree(base_backup(), directory / name)

    (directory / "empty").mkdir()
    refused("empty", "no PostgreSQL data directory")
    refused("absent", "no PostgreSQL data directory")
    (copy("other-version") / "PG_VERSION").write_text("16\n")
    refused("other-version", "PostgreSQL 16", "pg_upgrade")
    (copy("running") / "postmaster.pid").touch()
    refused("running", "a server runs on it", "pg_ctl stop")
    (copy("online") / "backup_label").touch()
    refused("online", "backup_label", "start it")
    (copy("standby") / "standby.signal").touch()
    refused("standby", "standby.signal", "promote")
    (copy("tablespace") / "pg_tblspc" / "16400").symlink_to(directory)
    refused("tablespace", "tablespace 16400", "SET TABLESPACE")
    control = copy("damaged-control") / "global" / "pg_control"
    control.write_bytes(control.read_bytes()[:200] + b"\xff" + control.read_bytes()[201:])
    refused("damaged-control", "checksum")
    (copy("no-map") / "global" / "pg_filenode.map").write_bytes(b"short")
    refused("no-map", "pg_filenode.map")


def test_what_does_not_come_along_is_named(directory: Path) -> None:
    """Slots, files that settings name or include, configuration that lies elsewhere: told, and imported without."""
    backup = copy_tree(base_backup(), directory / "backup")
    (backup / "pg_replslot" / "standby_1").mkdir()
    (backup / "server.key").touch()
    (backup / "pg_hba.conf").unlink()
    with (backup / "postgresql.conf").open("a") as configuration:
        configuration.write("include_dir = 'conf.d'\n")

    done = import_command(backup, directory / "objects")

    assert done.returncode == 0, done.stderr
    for part in (
        "replication slots (standby_1)",
        "(server.key)",
        "pg_hba.conf: it lies outside",
        "postgresql.conf includes",
    ):
        assert part in done.stderr, done.stderr
    quiet = import_command(base_backup(), directory / "objects")
    assert quiet.returncode == 0
    assert "left out" not in quiet.stderr


def test_a_server_that_was_killed_is_refused(directory: Path) -> None:
    """Its files lack what only WAL has; after a start and a clean stop they do not."""
    server = StockServer.create(directory, base_backup())
    server.start()
    with server.connect() as connection:
        connection.execute("create table t as select generate_series(1, 1000) i")
    server.process.kill()
    (server.data / "postmaster.pid").unlink()
    refused = import_command(server.data, directory / "objects")
    assert refused.returncode == 1
    assert "not cleanly shut down" in refused.stderr

    server.start()
    server.stop()

    assert import_command(server.data, directory / "objects").returncode == 0


def test_a_damaged_page_is_named(directory: Path) -> None:
    """One flipped bit in one page: the import ends with the file and the block, and no lakebase is there."""
    backup, _ = stock_database(directory, scale=1)
    path = max((backup / "base").glob("*/*"), key=lambda file: file.stat().st_size)
    pages = bytearray(path.read_bytes())
    pages[8192 * 17 + 4000] ^= 0x10
    path.write_bytes(pages)

    refused = import_command(backup, directory / "objects")

    assert refused.returncode == 1
    assert str(path.relative_to(backup)) in refused.stderr
    assert "block 17" in refused.stderr
    assert "checksum" in refused.stderr
    assert not clusters(directory / "objects")
    assert not [file for file in (directory / "objects").glob("**/*") if file.is_file()]


def test_an_interrupted_import_leaves_no_lakebase(directory: Path) -> None:
    """Ctrl-C ends it with status 1, and what it wrote is removed."""
    backup, _ = stock_database(directory, scale=20)
    line = [str(environment().lakebase), "import", "--from-pgdata", str(backup)]
    with subprocess.Popen(
        [*line, "--object-storage", f"file://{directory / 'objects'}"], stderr=subprocess.PIPE
    ) as process:
        wait_for("the scratch directory", lambda: any(Path("/tmp").glob(f"lakebase-import-*-{process.pid}/*")), 30)
        process.send_signal(2)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert b"interrupted" in error
    assert not [file for file in (directory / "objects").glob("**/*") if file.is_file()]
    assert not list(Path("/tmp").glob(f"lakebase-import-*-{process.pid}"))


def test_a_cluster_without_checksums_goes_in_and_comes_out(directory: Path) -> None:
    """Hint bits then have to be in WAL by another setting, which the writer forces."""
    backup = copy_tree(base_backup(), directory / "plain")
    run_as_postgres("pg_checksums", "--disable", "--pgdata", str(backup))
    with LocalCluster(page_service=PageServiceSettings(shards=2), backup=backup) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t as select generate_series(1, 1000) i")
            assert value(connection, "show data_checksums") == "off"
            assert number(connection, "select count(*) from t") == 1000
        writer.process.kill()
        writer = cluster.start_writer()
        with writer.connect() as connection:
            assert number(connection, "select count(*) from t") == 1000
        cluster.export(directory / "exported", "--at", format_lsn(cluster.wait_caught_up()))
    (directory / "stock").mkdir()
    server = StockServer.create(directory / "stock", directory / "exported")
    server.start()
    try:
        with psycopg.connect(server.dsn()) as connection:
            assert number(connection, "select count(*) from t") == 1000
    finally:
        server.stop()
