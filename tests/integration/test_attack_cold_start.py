"""What a user may do that the next compute has to survive: each test tries to make a cold start lose something, or fail."""

import re
import threading
import time
from typing import Literal

import psycopg
import pytest

from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.environment import give_to_postgres, scratch
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import StockServer, amcheck, base_backup, number, parse_lsn, run_as_postgres, value
from lakebase_testing.waiting import wait_for


def restarted(cluster: LocalCluster, writer: Writer, parameters: dict[str, str] | None = None) -> Writer:
    """Kills a compute and starts another on an empty disk."""
    writer.process.kill()
    return cluster.start_writer(parameters)


def test_a_tablespace_does_not_keep_later_computes_from_starting() -> None:
    """One statement of a superuser made every later cold start fail: relations in tablespaces are not supported, and the
    in-place ones, a developer's option that needs no link, are let through. What is in them is named, and fails by itself."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        cluster.expect_log("tablespaces are not supported")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table kept (i int)")
            connection.execute("insert into kept values (1)")
            connection.execute("set allow_in_place_tablespaces = on")
            connection.execute("create tablespace inside location ''")
            connection.execute("create table t tablespace inside as select 1 i")
            connection.execute("create database other tablespace inside")

        for _ in range(2):
            writer = restarted(cluster, writer)
            assert "tablespaces are not supported" in writer.process.log_text()

        with writer.connect() as connection:
            assert value(connection, "select count(*) from kept") == 1
            with pytest.raises(psycopg.Error):
                connection.execute("select * from t")
            with pytest.raises(psycopg.Error):
                connection.execute("insert into t values (2)")
            connection.execute("drop table t")
        exported = cluster.export(cluster.directory / "exported", check=False)
        assert exported.returncode != 0
        assert "tablespaces are not supported" in exported.stdout + exported.stderr
        with writer.connect() as connection:
            connection.execute("drop database other")


@pytest.mark.parametrize("disk", [True, False], ids=["with its disk", "without its disk"])
def test_settings_outlive_a_page_server_and_then_the_compute(disk: bool) -> None:
    """A configuration file is in no WAL: a page server that died before its layer was durable took it along, and the agent
    believed it safe. A rule of pg_hba.conf came back with the next compute."""
    settings = PageServiceSettings(shards=2, freeze_interval="1h", freeze_bytes="1GiB")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("alter system set work_mem = '12345kB'")
        wait_for(
            "the page service to keep the settings",
            lambda: "the page service keeps a file that changed" in writer.process.log_text(),
            20,
        )
        for page_server in cluster.page_servers:
            page_server.kill()
            cluster.restart_page_server(page_server, disk=disk)
        with writer.connect() as connection:
            # All of them answer again, so that the agent has met the new one of shard 0.
            connection.execute("create table t as select generate_series(1, 1000) i")
        wait_for(
            "the settings to be with the page service again",
            lambda: "the page service was given a file again" in writer.process.log_text(),
            20,
        )

        writer = restarted(cluster, writer)

        with writer.connect() as connection:
            assert value(connection, "show work_mem") == "12345kB"


def test_relations_grow_and_shrink_across_files_of_a_gigabyte() -> None:
    """Blocks beyond the first file of a relation: filled, evicted, cut off whole and in the middle, and grown again."""
    settings = PageServiceSettings(shards=4, cache_bytes=64 << 20, freeze_bytes="64MiB")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer({"autovacuum": "off", "max_wal_size": "4GB"})
        with writer.connect() as connection:
            # A row per page: 1.1 GB of pages for 130 MB of WAL.
            connection.execute("create table t (i int, note text) with (fillfactor = 10)")
            connection.execute("insert into t select i, repeat('x', 700) from generate_series(1, 140000) i")
            assert number(connection, "select pg_relation_size('t') / 8192") > 131072
            total = number(connection, "select sum(i) from t")
        writer = restarted(cluster, writer, {"autovacuum": "off"})
        with writer.connect() as connection:
            assert number(connection, "select sum(i) from t") == total
            connection.execute("delete from t where i > 130000")
            connection.execute("vacuum (truncate) t")
            assert number(connection, "select pg_relation_size('t') / 8192") < 131072
        writer = restarted(cluster, writer, {"autovacuum": "off"})
        with writer.connect() as connection:
            assert number(connection, "select count(*) from t") == 130000
            connection.execute("insert into t select i, repeat('y', 700) from generate_series(130001, 136000) i")
            assert number(connection, "select count(*) from t where note like 'y%'") == 6000
            connection.execute("update t set note = note || 'z' where i % 1000 = 0")
        writer = restarted(cluster, writer, {"autovacuum": "off"})
        with writer.connect() as connection:
            assert number(connection, "select count(*) from t") == 136000
            assert number(connection, "select count(*) from t where note like '%z'") == 136
            assert number(connection, "select count(distinct i) from t") == 136000
        amcheck(writer.port, ["postgres"])


def test_transaction_ids_pass_an_epoch_and_multixacts_their_end() -> None:
    """32-bit counters of a cluster that is old: a cold start at each side of the border must neither hand out an id twice nor
    take the future for the past."""
    server = StockServer.create(scratch("old"), base_backup())
    server.start()
    with server.connect() as connection:
        connection.execute("alter database template0 allow_connections on")
    run_as_postgres(
        "vacuumdb", "--all", "--freeze", "--host=127.0.0.1", f"--port={server.port}", "--username=postgres",
    )  # fmt: skip
    with server.connect() as connection:
        connection.execute("alter database template0 allow_connections off")
        connection.execute("vacuum freeze pg_database")
    server.stop()
    backup = server.data
    # Six transactions and six multixacts below the border.
    run_as_postgres(
        "pg_resetwal", "--pgdata", str(backup), "--next-transaction-id=4294967290", "--oldest-transaction-id=4294967285",
        "--multixact-ids=4294967290,4294967290", "--multixact-offset=4294967290",
    )  # fmt: skip
    for name in ("pg_xact/0FFF", "pg_multixact/offsets/FFFF", "pg_multixact/members/14078"):
        (backup / name).write_bytes(bytes(256 << 10))
        give_to_postgres(backup / name)
    parameters = {"autovacuum": "off", "max_prepared_transactions": "5"}
    with LocalCluster(page_service=PageServiceSettings(shards=2), backup=backup) as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer(parameters)
        with writer.connect() as connection:
            connection.execute("create table t (i int primary key, j int)")
            connection.execute("insert into t values (0, 0)")
        for round_number in range(1, 6):
            # Not left by the statement: that would commit.
            open_one = writer.connect()
            with writer.connect() as one, writer.connect() as two:
                one.execute("insert into t values (%s, 0)", (round_number,))
                open_one.execute("begin")
                open_one.execute("insert into t values (%s, 1)", (-round_number,))
                # Two lockers make a multixact, which the row keeps.
                one.execute("begin")
                one.execute("select * from t where i = 0 for share")
                two.execute("begin")
                two.execute("select * from t where i = 0 for share")
                two.execute("insert into t values (%s, 2)", (1000 + round_number,))
                two.execute("commit")
                one.execute("commit")
                one.execute("begin")
                one.execute("insert into t values (%s, 3)", (2000 + round_number,))
                one.execute(f"prepare transaction 'p{round_number}'".encode())
            writer = restarted(cluster, writer, parameters)
            open_one.close()
            with writer.connect() as connection:
                assert number(connection, "select count(*) from t where i < 0") == 0
                assert number(connection, "select count(*) from t where j = 2") == round_number
                connection.execute(f"commit prepared 'p{round_number}'".encode())
                connection.execute("update t set j = j where i = 0")
                assert number(connection, "select count(*) from t") == 1 + 3 * round_number
        with writer.connect() as connection:
            assert number(connection, "select pg_current_xact_id()::text::bigint >> 32") == 1
            connection.execute("vacuum freeze t")
            assert number(connection, "select count(*) from t") == 16
            # Not all of amcheck: the catalogs of a cluster that was aged by pg_resetwal are no longer what it believes.
            connection.execute("create extension amcheck")
            connection.execute("select bt_index_check('t_pkey', true)")


def test_what_is_neither_table_nor_index() -> None:
    """Commit timestamps, replication origins, large objects, comments on shared objects, sequences of serial columns."""
    parameters = {"track_commit_timestamp": "on"}
    with LocalCluster(page_service=PageServiceSettings(shards=4, stripe_blocks=16)) as cluster:
        writer = cluster.start_writer(parameters)
        with writer.connect() as connection:
            connection.execute("create table t (id serial primary key, big oid)")
            connection.execute("alter table t alter column id set default nextval('t_id_seq')")
            connection.execute("insert into t (big) select lo_from_bytea(0, decode(repeat('ab', 100000), 'hex'))")
            connection.execute("select pg_replication_origin_create('upstream')")
            connection.execute("select pg_replication_origin_advance('upstream', '0/AAAAAAA')")
            connection.execute("alter database postgres set work_mem = '8765kB'")
            stamp = value(connection, "select pg_xact_commit_timestamp(xmin)::text from t")
            assert stamp is not None
        for _ in range(2):
            writer = restarted(cluster, writer, parameters)
            with writer.connect() as connection:
                assert value(connection, "select length(lo_get(big)) from t") == 100000
                assert (
                    value(connection, "select pg_replication_origin_progress('upstream', false)::text") == "0/AAAAAAA"
                )
                assert value(connection, "show work_mem") == "8765kB"
                assert value(connection, "select pg_xact_commit_timestamp(xmin)::text from t where id = 1") == stamp
        # Without it and with it again: what was before is not asked for, and nothing fails.
        writer = restarted(cluster, writer)
        with writer.connect() as connection:
            connection.execute("update t set big = null")
        writer = restarted(cluster, writer, parameters)
        with writer.connect() as connection:
            connection.execute("insert into t (big) values (null)")
            assert value(
                connection, "select pg_xact_commit_timestamp(xmin) is not null from t order by id desc limit 1"
            )
        amcheck(writer.port, ["postgres"])


def test_persistence_changes_back_and_forth() -> None:
    """A table that becomes unlogged is emptied by a cold start, one that becomes logged is kept, under whatever file number."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer({"shared_buffers": "1MB"})
        with writer.connect() as connection:
            for name in ("a", "b", "c"):
                connection.execute(f"create unlogged table {name} (id serial primary key, note text)".encode())
                connection.execute(
                    f"insert into {name} (note) select repeat('x', 300) from generate_series(1, 5000)".encode()
                )
            connection.execute("alter table a set logged")
            connection.execute("alter table b set logged")
            connection.execute("alter table b set unlogged")
            connection.execute("alter table c set logged")
            connection.execute("truncate c")
            connection.execute("insert into c (note) values ('kept')")
            connection.execute("update a set note = 'y' where id % 2 = 0")
        for _ in range(2):
            writer = restarted(cluster, writer, {"shared_buffers": "1MB"})
            with writer.connect() as connection:
                assert number(connection, "select count(*) from a where note = 'y'") == 2500
                assert number(connection, "select count(*) from a") == 5000
                assert number(connection, "select count(*) from b") == 0
                assert number(connection, "select count(*) from c where note = 'kept'") == 1
                assert number(connection, "select nextval('c_id_seq')") > 5000
            amcheck(writer.port, ["postgres"])


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_prepared_transaction_makes_and_drops_relations_after_a_cold_start(end: str) -> None:
    """The files to remove are in the state of the transaction, which only a file made from the log holds; more than 64
    subtransactions, locks on rows and a sequence come along."""
    parameters = {"max_prepared_transactions": "2", "shared_buffers": "1MB"}
    with LocalCluster(page_service=PageServiceSettings(shards=3, stripe_blocks=16)) as cluster:
        writer = cluster.start_writer(parameters)
        with writer.connect() as connection:
            for name in ("dropped", "emptied", "locked"):
                connection.execute(f"create table {name} (i int primary key, note text)".encode())
                connection.execute(
                    f"insert into {name} select i, repeat('x', 300) from generate_series(1, 3000) i".encode()
                )
            files = value(connection, "select pg_relation_filepath('emptied')")
            connection.execute("begin")
            connection.execute("create table made as select i, repeat('y', 300) note from generate_series(1, 3000) i")
            connection.execute("drop table dropped")
            connection.execute("truncate emptied")
            connection.execute("select * from locked where i <= 10 for update")
            for i in range(100):
                connection.execute(f"savepoint s{i}".encode())
                connection.execute("insert into made values (%s, 'sub')", (10_000 + i,))
            connection.execute("prepare transaction 'p'")
            connection.execute("insert into locked values (5000, 'other')")
        for _ in range(2):
            writer = restarted(cluster, writer, parameters)
        with writer.connect() as connection:
            connection.execute("set lock_timeout = '200ms'")
            for statement in ("delete from locked where i = 5", "select * from dropped", "select * from emptied"):
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    connection.execute(statement.encode())
            connection.execute(f"{end} prepared 'p'".encode())
        is_committed = end == "commit"
        for _ in range(2):
            with writer.connect() as connection:
                assert (value(connection, "select to_regclass('made')::text") is not None) == is_committed
                assert (value(connection, "select to_regclass('dropped')::text") is None) == is_committed
                assert number(connection, "select count(*) from emptied") == (0 if is_committed else 3000)
                assert (value(connection, "select pg_relation_filepath('emptied')") != files) == is_committed
                if is_committed:
                    assert number(connection, "select count(*) from made") == 3100
                    assert number(connection, "select count(*) from made where note = 'sub'") == 100
                else:
                    assert number(connection, "select count(*) from dropped") == 3000
                connection.execute("update locked set note = note || 'z' where i <= 10")
                assert number(connection, "select count(*) from locked") == 3001
            amcheck(writer.port, ["postgres"])
            writer = restarted(cluster, writer, parameters)


def test_the_log_may_end_anywhere() -> None:
    """Behind a switch of segments, in a page's header, at the end of a page, behind a record of many segments: the next compute
    goes on there, and its first record follows the last."""
    statements = [
        "select pg_switch_wal()",
        "checkpoint",
        "select pg_create_restore_point('here')",
        "select pg_logical_emit_message(false, 'large', repeat('x', 40000000))",
        "select pg_switch_wal(); select pg_switch_wal()",
    ]
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create table t (i int primary key)")
        ends: set[int] = set()
        for i in range(25):
            statement = statements[i] if i < len(statements) else None
            with writer.connect() as connection:
                connection.execute("insert into t values (%s)", (i,))
                if statement is None:
                    # The message's record ends between 48 bytes before a page's end and 80 bytes behind its start.
                    at = parse_lsn(str(value(connection, "select pg_current_wal_insert_lsn()::text")))
                    wanted = (-48 + 8 * (i - len(statements)) - at - 56) % 8192
                    message = f"select pg_logical_emit_message(false, 'x', repeat('x', {wanted}), true)"
                    connection.execute(message.encode())
                else:
                    for part in statement.split("; "):
                        connection.execute(part.encode())
            writer = restarted(cluster, writer)
            found = re.findall(r"elected ballot=\S+ end_of_log=(\S+)", writer.process.log_text())
            ends.add(parse_lsn(found[-1]) % 8192)
            with writer.connect() as connection:
                assert number(connection, "select count(*) from t") == i + 1
        assert len(ends) > 12, sorted(ends)
        assert any(end <= 40 or end > 8192 - 40 for end in ends), sorted(ends)
        amcheck(writer.port, ["postgres"])


@pytest.mark.parametrize("evict", ["always", "as_needed"])
def test_a_database_number_is_used_again_and_again(evict: Literal["always", "as_needed"]) -> None:
    """Every file of the dropped database has the name of one of the new: nothing of the old may shine through, neither from the
    cache nor from layers, and a copy that was interrupted leaves nothing behind that hurts."""
    settings = PageServiceSettings(shards=3, stripe_blocks=16, evict=evict, freeze_bytes="1MiB", freeze_interval="1s")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer({"shared_buffers": "2MB"})
        with writer.connect() as connection:
            for name in ("small", "large"):
                connection.execute(f"create database {name}".encode())
        for name, rows in (("small", 10), ("large", 20_000)):
            with writer.connect(name) as connection:
                connection.execute("create table t (i int primary key, note text)")
                connection.execute(
                    f"insert into t select i, '{name}' || repeat('x', 100) from generate_series(1, {rows}) i".encode()
                )
        steps = [("large", "file_copy"), ("small", "wal_log"), ("large", "wal_log"), ("small", "file_copy")]
        for step, (template, strategy) in enumerate(steps):
            create = f"create database again template {template} strategy {strategy} oid 90000"
            with writer.connect() as connection:
                connection.execute("drop database if exists again")
                connection.execute(create.encode())
            if step % 2 == 0:
                writer = restarted(cluster, writer, {"shared_buffers": "2MB"})
            with writer.connect("again") as connection:
                expected = 10 if template == "small" else 20_000
                found = number(connection, f"select count(*) from t where note like '{template}%'")
                assert found == expected == number(connection, "select count(*) from t")
                connection.execute("update t set note = note || 'more'")
            if step % 2 == 1:
                writer = restarted(cluster, writer, {"shared_buffers": "2MB"})
            with writer.connect("again") as connection:
                assert number(connection, "select count(*) from t where note like '%more'") == expected
            amcheck(writer.port, ["again", template])
        # Killed somewhere in a copy: the database is there as a whole or not at all, and nothing else suffers.
        for strategy in ("file_copy", "wal_log"):
            with writer.connect() as connection:
                connection.execute("drop database if exists again")
            copy = f"create database again template large strategy {strategy}"
            process = threading.Thread(target=attempt, args=(writer, copy))
            process.start()
            time.sleep(0.15)
            writer = restarted(cluster, writer, {"shared_buffers": "2MB"})
            process.join()
            with writer.connect() as connection:
                connection.execute("drop database if exists again")
                # Not with the same number: as after a crash of PostgreSQL anywhere, a directory may be left.
                connection.execute(f"create database again template small strategy {strategy}".encode())
            with writer.connect("again") as connection:
                assert number(connection, "select count(*) from t") == 10
            amcheck(writer.port, ["again", "large", "small"])


def attempt(writer: Writer, statement: str) -> None:
    """Makes a statement that may lose its server."""
    try:
        with writer.connect() as connection:
            connection.execute(statement.encode())
    except psycopg.OperationalError:
        return
