"""What goes wrong beneath the page service stays there: damaged files, object storage that is away, full disks, two owners.

That page servers do not answer at all, and what a reader sees then, is in `test_block_cache.py`.
"""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import psycopg
import pytest

from lakebase_testing.clients import Inserters, create_table, stored_ids
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.faults import SmallDisk
from lakebase_testing.page_service import ObjectStorage, PageServer, PageServiceSettings
from lakebase_testing.postgres import Connection, amcheck, number
from lakebase_testing.s3 import own_s3
from lakebase_testing.storage_faults import Outage, storage_outage
from lakebase_testing.waiting import wait_for

_MIB = 1 << 20
# Nothing but what a test writes: no statistics, no pages of catalogs in a layer of a table.
_QUIET = {"autovacuum": "off"}
_ROWS = 20_000


def count(writer: Writer, statement: str) -> int:
    """The number that a statement returns, on a connection of its own."""
    with writer.connect() as connection:
        return number(connection, statement)


def stripe_hash(relation: int, stripe: int) -> int:
    """Place of a stripe in the hash space (docs/formats/layers.md, Keys)."""
    mask = (1 << 64) - 1
    x = ((relation << 32) + stripe + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return ((x ^ x >> 31) >> 32) or 1


def table_of(connection: Connection, page_server: PageServer) -> str:
    """Makes an empty table whose first stripe is on a page server; returns its name."""
    for attempt in range(64):
        name = f"t{attempt}"
        connection.execute(f"create table {name} (i int, note text)".encode())
        place = stripe_hash(number(connection, f"select pg_relation_filenode('{name}')"), 0)
        if page_server.begin <= place < page_server.end:
            return name
    raise AssertionError("64 tables, and none of them on that shard")


def fill(connection: Connection, table: str) -> None:
    """Adds rows to a table, 12 MB."""
    statement = f"insert into {table} select i, repeat('x', 500) from generate_series(1, {_ROWS}) i"
    connection.execute(statement.encode())


def layer_files(page_server: PageServer) -> list[Path]:
    """Its objects, in the order in which they were made."""
    return sorted(page_server.objects("layers").iterdir())


def flip_bits(path: Path, begin: float) -> None:
    """Damages every kilobyte of a layer's blocks, from a fraction of them on; the index behind them stays sound."""
    contents = bytearray(path.read_bytes())
    # docs/formats/layers.md, Header and Trailer.
    first, index = 80, struct.unpack_from("<Q", contents, len(contents) - 128 + 24)[0]
    places = range(first + int((index - first) * begin) + 10, index, 1000)
    assert places, f"{path} has no blocks there"
    for at in places:
        contents[at] ^= 4
    path.write_bytes(contents)


def put_back(path: Path, contents: bytes) -> None:
    """Undoes the damage."""
    path.write_bytes(contents)


def lost_layers(page_server: PageServer) -> dict[str, str]:
    """Layers that a page server calls lost, and why."""
    lost = page_server.status()["lost_layers"]
    assert isinstance(lost, dict)
    return {str(name): str(cause) for name, cause in cast("dict[str, object]", lost).items()}


def restart(cluster: LocalCluster, page_server: PageServer, *, disk: bool, meanwhile: Callable[[], None]) -> None:
    """Kills a page server, changes something, and starts it again."""
    page_server.kill()
    meanwhile()
    cluster.restart_page_server(page_server, disk=disk)


def test_a_damaged_local_layer_is_fetched_again() -> None:
    """A local file is a copy: no page of it is served unchecked, and the object is as good."""
    with LocalCluster(page_service=PageServiceSettings(shards=1)) as cluster:
        cluster.expect_log("local layer file is of no use", "no connection to the page server")
        writer = cluster.start_writer(_QUIET)
        (page_server,) = cluster.page_servers
        with writer.connect() as connection:
            connection.execute("create table t (i int, note text)")
            fill(connection, "t")
        page_server.freeze()

        def damage() -> None:
            files = sorted((page_server.data / "layers").iterdir())
            assert files
            for file in files:
                flip_bits(file, 0)

        restart(cluster, page_server, disk=True, meanwhile=damage)
        writer.process.kill()
        successor = cluster.start_writer(_QUIET)

        assert count(successor, "select sum(length(note)) from t") == 500 * _ROWS
        assert page_server.figure("damaged_files_total") > 0
        assert lost_layers(page_server) == {}
        amcheck(successor.port, ["postgres"])


def test_a_damaged_object_fails_the_reads_that_need_it_and_no_others() -> None:
    """There is one copy of everything: the shard names the object that must be restored, a reader gets an I/O error."""
    settings = PageServiceSettings(shards=2, freeze_bytes="64MiB", freeze_interval="10min", fill_timeout="5s")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("local layer file is of no use", "a layer is lost", "a read of PostgreSQL fails")
        cluster.expect_log("no connection to the page server")
        writer = cluster.start_writer(_QUIET)
        shard = cluster.page_servers[1]
        with writer.connect() as connection:
            table = table_of(connection, shard)
            connection.execute("create table sound (i int, note text)")
            fill(connection, "sound")
            shard.freeze()
            before = layer_files(shard)
            fill(connection, table)
            shard.freeze()
            (victim,) = set(layer_files(shard)) - set(before)
        undamaged = victim.read_bytes()
        # The length of the table stands before its pages, and is needed for the start of any compute.
        restart(cluster, shard, disk=False, meanwhile=lambda: flip_bits(victim, 0.3))
        writer.process.kill()

        successor = cluster.start_writer(_QUIET)

        with successor.connect() as connection:
            statement = f"select sum(length(note)) from {table}".encode()
            for _ in range(2):
                with pytest.raises(psycopg.errors.IoError, match="could not read blocks"):
                    connection.execute(statement)
            # The same connection goes on.
            assert number(connection, "select sum(length(note)) from sound") == 500 * _ROWS
            connection.execute("insert into sound values (0, 'more')")
        ((name, cause),) = lost_layers(shard).items()
        assert victim.name in name
        assert "object is damaged" in cause
        lines = [line for line in successor.process.log_text().splitlines() if "a read of PostgreSQL fails" in line]
        assert lines
        assert all(re.search(r"relation 1663/\d+/\d+ blocks? \d+.* as of .*", line) for line in lines), lines
        assert any(victim.name in line for line in lines), lines

        # Whoever has a backup of the bucket puts the object back.
        restart(cluster, shard, disk=False, meanwhile=lambda: put_back(victim, undamaged))
        assert count(successor, f"select sum(length(note)) from {table}") == 500 * _ROWS
        assert lost_layers(shard) == {}


_OUTAGES = [
    pytest.param("file", "away", id="a directory that is away"),
    pytest.param("s3", "away", id="S3 refuses connections"),
    pytest.param("s3", "silent", id="S3 does not answer"),
]


@pytest.mark.parametrize(("storage", "outage"), _OUTAGES, indirect=["storage"])
def test_ingest_goes_on_without_object_storage(storage: ObjectStorage, outage: Outage) -> None:
    """What cannot be uploaded waits on the disk; pages are served meanwhile, and the rest goes by itself."""
    settings = PageServiceSettings(shards=2, object_storage=storage, freeze_bytes="1MiB", freeze_interval="1s")
    with LocalCluster(page_service=settings) as cluster:
        if storage == "s3" and own_s3() is None:
            pytest.skip("the S3 server is not this run's to stop")
        cluster.expect_log("object storage does not take", "compaction", "no connection to the page server")
        writer = cluster.start_writer(_QUIET)
        with writer.connect() as connection:
            create_table(connection)
            connection.execute("create table t (i int, note text)")
        with Inserters(writer.dsn) as inserters:
            for page_server in cluster.page_servers:
                page_server.freeze()
            with storage_outage(cluster, outage):
                durable = [lsn_of(page_server.status()["durable_lsn"]) for page_server in cluster.page_servers]
                with writer.connect() as connection:
                    fill(connection, "t")
                wanted = inserters.count() + 200
                wait_for("commits to go on", lambda: inserters.count() >= wanted, 60)
                wait_for(
                    "layers to wait",
                    lambda: all(int(str(server.status()["waiting_layers"])) > 0 for server in cluster.page_servers),
                    30,
                )
                # Refused connections are tried again for a minute before they are called a trouble.
                if storage == "file":
                    wait_for("a trouble", lambda: all(server.status()["troubles"] for server in cluster.page_servers))
                cluster.wait_ingested(max(cluster.positions("commit_lsn")))
                now = [lsn_of(page_server.status()["durable_lsn"]) for page_server in cluster.page_servers]
                assert now == durable, "object storage was there"
                # A reader with nothing in its cache.
                writer.process.kill()
                writer = cluster.start_writer(_QUIET)
                assert count(writer, "select sum(length(note)) from t") == 500 * _ROWS
            end = max(cluster.positions("commit_lsn"))
            for page_server in cluster.page_servers:
                wait_for(
                    f"{page_server.name} to have brought all to object storage",
                    lambda page_server=page_server: lsn_of(page_server.status()["durable_lsn"]) >= end,
                    90,
                )
                wait_for("the end of troubles", lambda page_server=page_server: not page_server.status()["troubles"])
        for page_server in cluster.page_servers:
            restart(cluster, page_server, disk=False, meanwhile=lambda: None)
        writer.process.kill()
        with cluster.start_writer(_QUIET).connect() as connection:
            assert inserters.ids() <= stored_ids(connection)


def test_two_owners_of_a_shard_do_no_harm() -> None:
    """One that was given up for dead, and replaced, comes back: it gets no WAL, changes no object that counts, and ends."""
    with LocalCluster(page_service=PageServiceSettings(shards=1, freeze_bytes="1MiB")) as cluster:
        cluster.expect_log("WARN", "another owner")
        writer = cluster.start_writer(_QUIET)
        (first,) = cluster.page_servers
        assert cluster.page_service is not None
        second = PageServer(cluster, "second", 0, cluster.page_service)
        cluster.add_process(second.process)
        second.generation = first.generation
        with writer.connect() as connection:
            connection.execute("create table t (i int, note text)")
            fill(connection, "t")
        # In the middle of uploads, and with WAL in memory that is not durable.
        first.process.freeze()
        second.start()
        second.wait_ready()

        def sound(owner: PageServer) -> None:
            end = max(cluster.positions("commit_lsn"))
            wait_for("the newer owner to have everything", lambda: lsn_of(owner.status()["ingested_lsn"]) >= end, 60)
            owner.freeze()
            assert owner.admin.call("POST", "/v1/compact").status == 200
            status = owner.status()
            assert (status["faults"], status["lost_layers"], status["troubles"]) == (0, {}, {})

        sound(second)
        first.process.thaw()
        assert first.process.wait_end() != 0
        assert "another owner" in first.process.log_text()
        # Nothing of it was removed or written over meanwhile.
        second.kill()
        second.lose_disk()
        second.start()
        second.wait_ready()
        sound(second)
        # The same with the other one, which takes the shard back while its owner runs.
        first.generation = second.generation
        first.start()
        first.wait_ready()
        assert second.process.wait_end() != 0
        sound(first)
        writer.process.kill()
        successor = cluster.start_writer(_QUIET)
        assert count(successor, "select sum(length(note)) from t") == 500 * _ROWS
        amcheck(successor.port, ["postgres"])
        # An older one is refused from the start.
        second.generation = first.generation - 2
        second.start()
        assert second.process.wait_end() != 0


def set_version(path: Path, version: int) -> None:
    """Changes the format version of a manifest or a layer."""
    contents = bytearray(path.read_bytes())
    struct.pack_into("<H", contents, 8, version)
    path.write_bytes(contents)


@pytest.mark.parametrize("version", [0, 2], ids=["older", "newer"])
def test_formats_of_other_versions_are_refused_by_number(version: int) -> None:
    """Whoever went back to an older engine, or forward past a change, reads which version is needed; nothing is changed."""
    settings = PageServiceSettings(shards=1, freeze_bytes="64MiB", freeze_interval="10min")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log(
            "a layer is lost", "no connection to the page server", "cannot be loaded", "nothing is made durable"
        )
        cluster.expect_log("not known", "format")
        writer = cluster.start_writer(_QUIET)
        (page_server,) = cluster.page_servers
        with writer.connect() as connection:
            connection.execute("create table t (i int)")
        page_server.freeze()
        page_server.kill()

        manifest = max(page_server.objects("manifests").iterdir())
        good = manifest.read_bytes()
        set_version(manifest, version)
        page_server.start()
        assert page_server.process.wait_end() != 0
        assert f"manifest format {version} is not known: this engine reads 1" in page_server.process.log_text()
        manifest.write_bytes(good)

        owner_file = page_server.data / "shard"
        good_text = owner_file.read_text()
        owner_file.write_text(good_text.replace("format = 1", f"format = {version}"))
        page_server.start()
        assert page_server.process.wait_end() != 0
        assert f"format = {version}" in page_server.process.log_text()
        owner_file.write_text(good_text)

        layer = max(page_server.objects("layers").iterdir())
        good = layer.read_bytes()
        set_version(layer, version)
        cluster.restart_page_server(page_server, disk=False)
        ((name, cause),) = lost_layers(page_server).items()
        assert layer.name in name
        assert f"layer format {version} is not known: this engine reads 1" in cause
        layer.write_bytes(good)

        description = cluster.directory / "objects" / cluster.id / "cluster.json"
        good_text = description.read_text()
        description.write_text(good_text.replace('"version": 1', f'"version": {version}'))
        refused = cluster.export(cluster.directory / "out", check=False)
        assert refused.returncode != 0
        assert f"format {version} is not known: this engine reads 1" in refused.stdout + refused.stderr
        description.write_text(good_text)

        restart(cluster, page_server, disk=False, meanwhile=lambda: None)
        writer.process.kill()
        assert count(cluster.start_writer(_QUIET), "select count(*) from t") == 0


def test_the_disk_of_a_page_server_may_be_full() -> None:
    """Copies of objects make room for what object storage does not have yet; without any, ingest waits."""
    settings = PageServiceSettings(shards=1, freeze_bytes="1MiB", freeze_interval="1s")
    cluster = LocalCluster(page_service=settings)
    (page_server,) = cluster.page_servers
    with SmallDisk(page_server.data, 48) as disk:
        page_server.process.wrapper = [*disk.wrapper, *page_server.process.wrapper]
        page_server.files = disk.path
        with cluster:
            cluster.expect_log("not take (a layer|layers)", "compaction", "No space")
            writer = cluster.start_writer(_QUIET)

            def durable(connection: Connection) -> None:
                """Waits until all of it is in object storage; a database in use writes now and then."""
                end = max(cluster.positions("commit_lsn"))

                def reached() -> bool:
                    connection.execute("insert into beats values (1)")
                    status = page_server.status()
                    return lsn_of(status["durable_lsn"]) >= end and not status["troubles"]

                wait_for("all to be durable", reached, 90)

            with writer.connect() as connection:
                connection.execute("create table t (i int, note text)")
                connection.execute("create table beats (i int)")
                fill(connection, "t")
                disk.fill()
                fill(connection, "t")
                durable(connection)
                assert page_server.figure("evictions_total") > 0
                with storage_outage(cluster, "away"):
                    for _ in range(4):
                        disk.fill()
                        fill(connection, "t")
                    wait_for(
                        "a layer that has no place", lambda: int(str(page_server.status()["frozen_layers"])) > 0, 30
                    )
                    assert page_server.status()["troubles"]
                    # Memory is no place for much of it: ingest waits then, and commits do not.
                    connection.execute("insert into t values (0, '')")
                disk.empty()
                durable(connection)
            writer.process.kill()
            successor = cluster.start_writer(_QUIET)
            assert count(successor, "select sum(length(note)) from t") == 6 * 500 * _ROWS
            amcheck(successor.port, ["postgres"])


def test_the_disk_of_a_compute_may_be_smaller_than_the_database() -> None:
    """Without a limit of its own the cache grows until the disk is full; then blocks are given back, and nothing fails."""
    cluster = LocalCluster(page_service=PageServiceSettings(shards=2))
    with cluster:
        cluster.expect_log("WARN")
        writer = cluster.new_writer({**_QUIET, "shared_buffers": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB"})
        with SmallDisk(writer.data, 160) as disk:
            writer.process.wrapper = [*disk.wrapper, *writer.process.wrapper]
            writer.start()
            cluster.grant(writer)
            writer.wait_running()
            with writer.connect() as connection:
                connection.execute("create table t (i int, note text)")
                for _ in range(16):
                    fill(connection, "t")
                assert number(connection, "select pg_table_size('t')") > 160 * _MIB
                for _ in range(2):
                    assert number(connection, "select sum(length(note)) from t") == 16 * 500 * _ROWS
                connection.execute("update t set i = i + 1 where i % 50 = 0")
            assert writer.figure("block_evictions_total") > 0
            assert writer.state() == "running"
            amcheck(writer.port, ["postgres"])
            writer.process.kill()


def test_a_shard_without_work_does_not_keep_wal() -> None:
    """Its durable position stood still, since a layer without values had no age: safekeepers kept all WAL for it, and the
    writer was slowed for a lag that nobody could end."""
    settings = PageServiceSettings(shards=4, freeze_bytes="1MiB", freeze_interval="1s")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("no connection to the page server")
        writer = cluster.start_writer(_QUIET)
        with writer.connect() as connection:
            table = table_of(connection, cluster.page_servers[2])
            # What the table's creation meant for other shards is behind them.
            for page_server in cluster.page_servers:
                page_server.freeze()
            fill(connection, table)
        end = max(cluster.positions("commit_lsn"))
        for page_server in cluster.page_servers:
            wait_for(
                f"{page_server.name} to have brought nearly all to object storage",
                lambda page_server=page_server: lsn_of(page_server.status()["durable_lsn"]) >= end - 2 * _MIB,
                30,
            )
        for page_server in cluster.page_servers:
            restart(cluster, page_server, disk=False, meanwhile=lambda: None)
        writer.process.kill()
        successor = cluster.start_writer(_QUIET)
        assert count(successor, f"select sum(length(note)) from {table}") == 500 * _ROWS
