"""Four ways in which separating pages from WAL loses data or gives wrong answers (findings A1, A2, A3 and B3), end to end.

Each remedy is also switched off somewhere, so that its test is known to look at something: named in each docstring.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import psycopg
import pytest

from lakebase_testing.clients import Pgbench, tpcb_sums
from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.page_proxy import NEWEST, GetPages, PageProxy
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import Connection, amcheck, number, value
from lakebase_testing.waiting import wait_for

_QUIET = {"autovacuum": "off"}
_MAIN = 0


@contextmanager
def proxied(settings: PageServiceSettings, change: Callable[[GetPages], GetPages]) -> Generator[LocalCluster]:
    """A cluster whose computes ask for other versions of pages than they mean to."""
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(tls=False, page_service=settings))
        cluster.expect_log("TLS is off", "no connection to the page server")
        for page_server in cluster.page_servers:
            proxy = stack.enter_context(PageProxy(page_server.ports["pages"], change))
            page_server.reached_at = proxy.port
        yield cluster


def oldest_allowed(asked: GetPages) -> GetPages:
    """The version that a page server which lags as far as it may would give."""
    return replace(asked, request_lsn=asked.not_modified_since) if asked.request_lsn == NEWEST else asked


def evict(connection: Connection, table: str) -> None:
    """Writes a table's pages and takes them out of shared buffers; with evict=always they are on no disk of the compute then."""
    connection.execute("checkpoint")
    connection.execute(
        "select pg_buffercache_evict(bufferid) from pg_buffercache"
        " where relfilenode = pg_relation_filenode(%s::regclass) and relforknumber = 0",
        (table,),
    )


def rows_found_by_index(connection: Connection) -> int:
    """What an index-only scan finds of the deleted row."""
    for setting in ("enable_seqscan", "enable_bitmapscan"):
        connection.execute(f"set {setting} = off".encode())
    plan = connection.execute("explain select id from t where id = 7").fetchall()
    assert "Index Only Scan" in str(plan), plan
    return number(connection, "select count(id) from t where id = 7")


@pytest.mark.parametrize("remedy", [True, False], ids=["by horizon", "by the page's own LSN"])
def test_deleted_rows_stay_deleted_for_index_only_scans(remedy: bool) -> None:
    """Finding A1: VACUUM marks a page all-visible, and marks it in the visibility map; the page leaves and comes back. Without
    the mark the next DELETE does not clear the map, and index-only scans return the deleted row for ever.

    The page server serves the oldest version that a request allows. With the remedy that is as of the last write of the page;
    without, as of the last change that moves the LSN in it. The same inside the library, with hint bits that are not logged:
    `deleted_rows_stay_deleted_for_index_only_scans` in engine/crates/vfs/tests/server/blocks.rs.
    """
    trusted: dict[int, int] = {}

    def change(asked: GetPages) -> GetPages:
        old = trusted.get(asked.relation)
        if remedy or old is None or asked.fork != _MAIN:
            return oldest_allowed(asked)
        return replace(asked, request_lsn=old, not_modified_since=old)

    with proxied(PageServiceSettings(shards=1, evict="always"), change) as cluster:
        writer = cluster.start_writer(_QUIET)
        with writer.connect() as connection:
            connection.execute("create extension pg_buffercache")
            connection.execute("create table t (id int)")
            connection.execute("create index on t (id)")
            connection.execute("insert into t select generate_series(1, 100)")
            # Hint bits now, so that VACUUM has none to set.
            assert number(connection, "select count(*) from t") == 100
            evict(connection, "t")
            trusted[number(connection, "select pg_relation_filenode('t')")] = cluster.wait_caught_up()
            connection.execute("vacuum t")
            evict(connection, "t")
            connection.execute("delete from t where id = 7")
            assert number(connection, "select count(*) from t") == 99
            found = rows_found_by_index(connection)
        if remedy:
            assert found == 0
            assert rows_of_successor(cluster, writer) == 0
            amcheck(cluster.writers[-1].port, ["postgres"])
        else:
            assert found == 1, "the trap no longer catches anybody: this test looks at nothing"


def rows_of_successor(cluster: LocalCluster, writer: Writer) -> int:
    """The same scan on a compute that starts on an empty disk."""
    writer.process.kill()
    with cluster.start_writer(_QUIET).connect() as connection:
        return rows_found_by_index(connection)


def test_pages_as_old_as_a_request_allows_are_young_enough() -> None:
    """Finding A1 again: whatever pgbench, VACUUM and index builds do, a request allows no version without one of its changes."""
    with proxied(PageServiceSettings(shards=2, evict="always"), oldest_allowed) as cluster:
        writer = cluster.start_writer({"shared_buffers": "1MB", "autovacuum_naptime": "1s"})
        Pgbench.initialise(writer.dsn(), scale=1)
        with writer.connect() as connection, Pgbench(writer.dsn, cluster.directory / "pgbench.log", clients=2):
            for wanted in range(100, 500, 100):
                wait_for(
                    f"{wanted} transactions",
                    lambda wanted=wanted: number(connection, "select count(*) from pgbench_history") > wanted,
                    60,
                )
                assert len(tpcb_sums(connection)) == 1
                connection.execute("vacuum pgbench_tellers, pgbench_branches, pgbench_accounts")
                connection.execute("reindex index concurrently pgbench_accounts_pkey")
        amcheck(writer.port, ["postgres"])


def test_no_transaction_id_is_given_twice() -> None:
    """Finding A2: an id that only an unfinished transaction used is in records of pages alone; given again and committed, it
    would make the unfinished transaction's rows visible.

    `postgresql_starts_from_a_plan_at_any_place_and_is_what_it_was` in engine/crates/backup/tests/stock_server.rs starts with the
    id of the last checkpoint instead, and finds such rows.
    """
    with LocalCluster(page_service=PageServiceSettings(shards=4)) as cluster:
        writer = cluster.start_writer(_QUIET)
        with writer.connect() as connection:
            connection.execute("create table t (i int)")
        for _ in range(2):
            unfinished = writer.connect()
            unfinished.execute("begin")
            # The last ones belong to subtransactions, of which nothing is logged but the rows.
            for i in range(1, 90):
                unfinished.execute("savepoint s")
                unfinished.execute("insert into t values (%s)", (i,))
            end = lsn_of(value(unfinished, "select pg_current_wal_insert_lsn()::text"))
            last = number(unfinished, "select max(xmin::text::bigint) from t where i > 0")
            # Behind them in the log, so that all of it is committed, and without an id of its own.
            with writer.connect() as connection:
                connection.execute("select pg_logical_emit_message(false, 'behind', 'them', true)")
            writer.process.kill()
            unfinished.close()

            writer = cluster.start_writer(_QUIET)

            with writer.connect() as connection:
                assert lsn_of(writer.status()["x"]) > end
                assert number(connection, "select pg_current_xact_id()::text") > last
                for _ in range(200):
                    connection.execute("insert into t values (-1)")
                assert number(connection, "select count(*) from t where i > 0") == 0


class Repeated:
    """A thread that repeats an action on a connection of its own until it is ended."""

    def __init__(self, writer: Writer, action: Callable[[Connection], None]) -> None:
        self._writer = writer
        self._action = action
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.rounds = 0

    def __enter__(self) -> "Repeated":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a statement hangs"
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with self._writer.connect() as connection:
                while not self._ended.is_set():
                    self._action(connection)
                    self.rounds += 1
        except (psycopg.Error, AssertionError) as failure:
            self._failure = failure


def test_evictions_fills_and_truncations_race_without_loss() -> None:
    """Finding A3: a reader that takes a hole for an empty page loses rows in silence; a late fill brings back what was cut off.

    Each step of the block map's protocol is left out, one at a time, in engine/crates/vfs-abi/tests/interleavings.rs, and loom
    finds the interleaving that goes wrong.
    """
    settings = PageServiceSettings(shards=2, evict="always", ingest_delay_ms=3)
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("WAL is delayed at random, for a test")
        writer = cluster.start_writer({**_QUIET, "shared_buffers": "1MB"})
        with writer.connect() as connection:
            connection.execute("create table kept (i int, note text)")
            connection.execute("insert into kept select i, repeat('x', 700) from generate_series(1, 2000) i")
            connection.execute("create table cut (i int, note text)")

        def read(connection: Connection) -> None:
            sums = "select count(*) || ' ' || sum(i) || ' ' || sum(length(note)) from kept"
            assert value(connection, sums) == "2000 2001000 1400000"

        def move(connection: Connection) -> None:
            connection.execute("update kept set note = repeat('y', 700) where i % 50 = 7")
            connection.execute("vacuum kept")

        def cut(connection: Connection) -> None:
            connection.execute("insert into cut select i, repeat('z', 700) from generate_series(1, 500) i")
            connection.execute("delete from cut where i > 100")
            # Cuts the end off, and the table grows over it again.
            connection.execute("vacuum cut")
            assert number(connection, "select count(*) from cut where i > 100") == 0
            connection.execute("insert into cut select i, 'again' from generate_series(101, 200) i")
            assert number(connection, "select count(*) from cut") == 200
            connection.execute("truncate cut")
            assert number(connection, "select count(*) from cut") == 0

        def drop(connection: Connection) -> None:
            connection.execute("create table short_lived as select generate_series(1, 3000) i")
            assert number(connection, "select sum(i) from short_lived") == 4_501_500
            connection.execute("drop table short_lived")

        with ExitStack() as stack:
            actors = [stack.enter_context(Repeated(writer, action)) for action in (read, read, move, cut, drop)]
            wait_for("five rounds of everybody", lambda: all(actor.rounds >= 5 for actor in actors), 120)
        with writer.connect() as connection:
            read(connection)
        assert writer.figure("block_evictions_total") > 1000
        amcheck(writer.port, ["postgres"])


_UNLOGGED_INDEXES = {
    "btree": "create index on u (i)",
    "hash": "create index on u using hash (i)",
    "gin": "create index on u using gin (words)",
    "gist": "create index on u using gist (place)",
    "spgist": "create index on u using spgist (place)",
    "brin": "create index on u using brin (i)",
}


def test_unlogged_tables_are_usable_and_empty() -> None:
    """Finding B3: PostgreSQL resets unlogged relations in recovery only, and a cold start has none: without their main forks
    every access is an error.

    `postgresql_starts_from_a_plan_at_any_place_and_is_what_it_was` in engine/crates/backup/tests/stock_server.rs leaves the main
    forks out, and finds that error.
    """
    with LocalCluster(page_service=PageServiceSettings(shards=2, evict="always")) as cluster:
        writer = cluster.start_writer(_QUIET)
        with writer.connect() as connection:
            connection.execute("create unlogged table u (i int primary key, words text[], place point, note text)")
            for statement in _UNLOGGED_INDEXES.values():
                connection.execute(statement.encode())

        for _ in range(2):
            with writer.connect() as connection:
                # The last column is stored outside of the table.
                connection.execute("alter table u alter note set storage external")
                connection.execute(
                    "insert into u select i, array[i::text, 'all'], point(i, i), repeat('x', 5000) from generate_series(1, 300) i"
                )
                connection.execute("checkpoint")
                for scan in ("on", "off"):
                    connection.execute(f"set enable_seqscan = {scan}".encode())
                    assert (
                        number(connection, "select sum(length(note)) from u where words @> array['all']") == 1_500_000
                    )
                    assert number(connection, "select count(*) from u where i = 7") == 1
                    assert number(connection, "select count(*) from u where place <@ box '((0,0),(9,9))'") == 9
            amcheck(writer.port, ["postgres"])
            writer.process.kill()

            writer = cluster.start_writer(_QUIET)

            with writer.connect() as connection:
                for scan in ("on", "off"):
                    connection.execute(f"set enable_seqscan = {scan}".encode())
                    assert number(connection, "select count(*) from u where words @> array['all']") == 0
                    assert number(connection, "select count(*) from u where i = 7") == 0
        with writer.connect() as connection:
            connection.execute("insert into u values (1, '{a}', point(1, 1), 'kept from here on')")
            connection.execute("alter table u set logged")
        writer.process.kill()
        assert rows(cluster.start_writer(_QUIET)) == [(1, "kept from here on")]


def rows(writer: Writer) -> list[tuple[object, ...]]:
    """What the table of the test before holds."""
    with writer.connect() as connection:
        return connection.execute("select i, note from u").fetchall()
