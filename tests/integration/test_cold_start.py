"""What a compute on an empty disk finds: everything that WAL says beside the pages of tables."""

import psycopg
import pytest

from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import amcheck, number, value


def restarted(cluster: LocalCluster, writer: Writer, parameters: dict[str, str] | None = None) -> Writer:
    """Kills a compute and starts another on an empty disk."""
    writer.process.kill()
    return cluster.start_writer(parameters)


def test_a_prepared_transaction_can_be_committed() -> None:
    """Others wait for it after the cold start, and its rows appear when it commits; another is rolled back."""
    parameters = {"max_prepared_transactions": "10"}
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer(parameters)
        with writer.connect() as connection:
            connection.execute("create table t (i int primary key)")
            for name, i in (("one", 1), ("two", 2)):
                connection.execute("begin")
                connection.execute("insert into t values (%s)", (i,))
                connection.execute(f"prepare transaction '{name}'".encode())
            connection.execute("insert into t values (3)")

        writer = restarted(cluster, writer, parameters)

        with writer.connect() as connection:
            assert value(connection, "select string_agg(gid, ' ' order by gid) from pg_prepared_xacts") == "one two"
            connection.execute("set lock_timeout = '200ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                connection.execute("insert into t values (1)")
            connection.execute("commit prepared 'one'")
            connection.execute("rollback prepared 'two'")
        writer = restarted(cluster, writer, parameters)
        with writer.connect() as connection:
            assert value(connection, "select array_agg(i order by i) from t") == [1, 3]
            assert value(connection, "select count(*) from pg_prepared_xacts") == 0


def test_an_open_transaction_is_rolled_back() -> None:
    """Its rows are on page servers, and nobody ever committed them, whatever transaction ids come next."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        other = writer.connect()
        with writer.connect() as connection:
            connection.execute("create table t (i int)")
            other.execute("begin")
            other.execute("insert into t select generate_series(1, 10000)")
            connection.execute("insert into t values (0)")
        writer = restarted(cluster, writer)
        other.close()

        with writer.connect() as connection:
            for i in range(50):
                connection.execute("insert into t values (%s)", (-i - 1,))
            assert value(connection, "select count(*) from t where i > 0") == 0
            assert value(connection, "select count(*) from t where i <= 0") == 51


def test_unlogged_relations_are_empty() -> None:
    """As after a crash: the relation exists, with an empty index, and takes rows again."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create unlogged table u (i int primary key, note text)")
            connection.execute("create unlogged sequence s")
            connection.execute("insert into u select i, repeat('x', 3000) from generate_series(1, 1000) i")
            assert value(connection, "select count(*) from u") == 1000

        for _ in range(2):
            writer = restarted(cluster, writer)
            with writer.connect() as connection:
                assert value(connection, "select count(*) from u") == 0
                connection.execute("insert into u values (1, 'again')")
                assert value(connection, "select note from u where i = 1") == "again"
                assert value(connection, "select nextval('s')") == 1
                connection.execute("alter table u set logged")
                connection.execute("alter table u set unlogged")


def test_sequences_never_go_back() -> None:
    """They may skip what was logged ahead, 32 values, but give no value twice."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create sequence s")
            last = [number(connection, "select nextval('s')") for _ in range(5)][-1]
        for _ in range(3):
            writer = restarted(cluster, writer)
            with writer.connect() as connection:
                following = number(connection, "select nextval('s')")
                assert last < following <= last + 33
                last = following


@pytest.mark.parametrize("strategy", ["wal_log", "file_copy"])
def test_a_database_made_by_either_strategy_is_there(strategy: str) -> None:
    """A copy of files is in WAL as one record; page servers copy the pages themselves."""
    with LocalCluster(page_service=PageServiceSettings(shards=2)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create database source")
        with writer.connect("source") as connection:
            connection.execute("create table t as select i, repeat('x', 100) note from generate_series(1, 5000) i")
            connection.execute("create index on t (i)")
        with writer.connect() as connection:
            connection.execute(f"create database copy template source strategy {strategy}".encode())
        with writer.connect("copy") as connection:
            connection.execute("insert into t values (0, 'new')")

        writer = restarted(cluster, writer)

        with writer.connect("copy") as connection:
            assert value(connection, "select count(*) from t") == 5001
            assert value(connection, "select note from t where i = 0") == "new"
        amcheck(writer.port, ["source", "copy"])
        with writer.connect() as connection:
            connection.execute("drop database source")
        writer = restarted(cluster, writer)
        with writer.connect() as connection:
            assert value(connection, "select count(*) from pg_database where datname in ('source', 'copy')") == 1
        amcheck(writer.port, ["copy"])


def test_ddl_is_there() -> None:
    """Relations that were made, rewritten, truncated, moved to other files, or dropped; the catalog's own files, too."""
    with LocalCluster(page_service=PageServiceSettings(shards=4, stripe_blocks=16)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("create extension amcheck")
            connection.execute("create table kept (i int primary key, note text)")
            connection.execute("insert into kept select i, repeat('x', 200) from generate_series(1, 10000) i")
            connection.execute("create table dropped as select * from kept")
            connection.execute("create table truncated as select * from kept")
            connection.execute("create table shorter as select * from kept")
            connection.execute("create index on kept using hash (i)")
            connection.execute("create index on kept using gin (to_tsvector('simple', note))")
            connection.execute("drop table dropped")
            connection.execute("truncate truncated")
            connection.execute("insert into truncated select * from kept limit 10")
            connection.execute("delete from shorter where i > 1000")
            connection.execute("vacuum (freeze) shorter")
            connection.execute("insert into shorter select i, 'grown' from generate_series(20001, 25000) i")
            connection.execute("alter table kept add column more int default 7")
            connection.execute("alter table kept alter column i type bigint")
            connection.execute("cluster kept using kept_pkey")
            connection.execute("reindex table concurrently kept")
            connection.execute("vacuum full pg_class")
            connection.execute("create materialized view m as select count(*) c from kept")

        for _ in range(2):
            writer = restarted(cluster, writer)
            with writer.connect() as connection:
                assert value(connection, "select count(*) || ' ' || sum(more) from kept") == "10000 70000"
                assert value(connection, "select count(*) from truncated") == 10
                assert value(connection, "select count(*) from shorter") == 6000
                assert value(connection, "select count(*) from shorter where note = 'grown'") == 5000
                assert value(connection, "select c from m") == 10000
                assert value(connection, "select to_regclass('dropped')") is None
            amcheck(writer.port, ["postgres"])


def test_settings_that_were_made_by_sql_are_kept() -> None:
    """postgresql.auto.conf is outside of WAL; it comes along as advisory state after a checkpoint."""
    with LocalCluster(page_service=PageServiceSettings(shards=1)) as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection:
            connection.execute("alter system set work_mem = '12345kB'")
            connection.execute("checkpoint")
        writer.stop_cleanly()

        successor = cluster.start_writer()

        with successor.connect() as connection:
            assert value(connection, "show work_mem") == "12345kB"
