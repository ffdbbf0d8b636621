"""Random statements against a model: computes are killed at any moment, and every later one has what was acknowledged.

Each worker has a table of its own and a model of it; a marker in the same transaction tells whether a transaction whose answer
was lost has happened. Indexes of all kinds come and go, tables are rewritten, truncated, vacuumed.
"""

import os
import random
import threading
import time
from dataclasses import replace

import psycopg
import pytest

from lakebase_testing.cluster import LocalCluster, Writer, lsn_of
from lakebase_testing.page_service import PageServer, PageServiceSettings
from lakebase_testing.postgres import Connection, amcheck, number
from lakebase_testing.waiting import wait_for

WORKERS = 4
ROUNDS = 5
NO_CACHE = PageServiceSettings(shards=4, stripe_blocks=16, evict="always", ingest_delay_ms=10, freeze_bytes="1MiB")
SMALL_CACHE = PageServiceSettings(
    shards=3, stripe_blocks=64, cache_bytes=16 << 20, freeze_bytes="1MiB", freeze_interval="1s"
)
TINY_LAYERS = PageServiceSettings(
    shards=2, stripe_blocks=16, cache_bytes=16 << 20, freeze_bytes="128KiB", freeze_interval="1s"
)
# Of each page server: layers are merged, imaged and removed all the time, and hardly any history is kept.
SHORT_HISTORY = """
[retention]
history_bytes = "1MiB"
lease_period = "1s"
"""

_INDEXES = (
    "using btree (note)",
    "using hash (i)",
    "using gin (to_tsvector('simple', note))",
    "using gist (box(point(i, i), point(i, i)))",
    "using spgist (note)",
    "using brin (i) with (pages_per_range = 2)",
)
_REWRITES = (
    "vacuum {t}",
    "vacuum (freeze) {t}",
    "vacuum full {t}",
    "cluster {t} using {t}_pkey",
    "reindex table {t}",
    "analyze {t}",
    "begin; alter table {t} set unlogged; alter table {t} set logged; commit",
)


class Worker:
    """One table, what should be in it, and a connection that comes and goes with the writer."""

    def __init__(self, number_: int, seed: int) -> None:
        self.table = f"t{number_}"
        self.number = number_
        self.random = random.Random(seed)
        self.rows: dict[int, str] = {}
        self.pending: dict[int, str] | None = None
        self.sequence = 0
        self.transactions = 0
        self.failure: BaseException | None = None

    def create(self, connection: Connection) -> None:
        """Makes the table and its marker."""
        connection.execute(f"create table {self.table} (i int primary key, note text not null)".encode())
        connection.execute("insert into marker values (%s, 0)", (self.number,))

    def settle(self, connection: Connection) -> None:
        """Finds out whether the transaction whose answer was lost has happened."""
        marker = number(connection, f"select sequence from marker where worker = {self.number}")
        if marker == self.sequence + 1 and self.pending is not None:
            self.rows = self.pending
            self.sequence = marker
        assert marker == self.sequence, f"{self.table}: the marker is {marker}, acknowledged were {self.sequence}"
        self.pending = None

    def check(self, connection: Connection) -> None:
        """Compares table and model, through the heap and through the primary key."""
        for setting in ("enable_indexscan", "enable_seqscan"):
            connection.execute(f"set {setting} = off".encode())
            found = connection.execute(f"select i, note from {self.table} order by i".encode()).fetchall()
            assert {int(row[0]): str(row[1]) for row in found} == self.rows, f"{self.table}: {setting} = off"
            assert len(found) == len(self.rows)
            connection.execute(f"reset {setting}".encode())
        assert number(connection, f"select count(*) from {self.table}") == len(self.rows)

    def run(self, dsn: str) -> None:
        """Works until the connection is lost."""
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                self.settle(connection)
                while True:
                    self._step(connection)
        except psycopg.OperationalError:
            return
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.failure = error

    def _step(self, connection: Connection) -> None:
        choice = self.random.random()
        if choice < 0.06:
            for statement in self.random.choice(_REWRITES).format(t=self.table).split("; "):
                connection.execute(statement.encode())
            return
        if choice < 0.1:
            name = f"{self.table}_x{self.random.randrange(3)}"
            connection.execute(f"drop index if exists {name}".encode())
            if self.random.random() < 0.7:
                kind = self.random.choice(_INDEXES)
                connection.execute(f"create index {name} on {self.table} {kind}".encode())
            return
        rows = dict(self.rows)
        connection.execute("begin")
        if self.random.random() < 0.03:
            connection.execute(f"truncate {self.table}".encode())
            rows.clear()
        for _ in range(self.random.randrange(1, 4)):
            is_undone = self.random.random() < 0.2
            before = dict(rows)
            connection.execute("savepoint s")
            self._change(connection, rows)
            if is_undone:
                connection.execute("rollback to savepoint s")
                rows = before
        connection.execute("update marker set sequence = %s where worker = %s", (self.sequence + 1, self.number))
        if self.random.random() < 0.1:
            connection.execute("rollback")
            return
        self.pending = rows
        connection.execute("commit")
        self.rows, self.pending = rows, None
        self.sequence += 1
        self.transactions += 1

    def _change(self, connection: Connection, rows: dict[int, str]) -> None:
        kind = self.random.random()
        low = self.random.randrange(2000)
        high = low + self.random.choice((1, 5, 200))
        word = f"{self.random.randrange(1 << 30):x}" * self.random.choice((1, 20, 100))
        if kind < 0.5:
            connection.execute(
                f"insert into {self.table} select i, i || %s from generate_series(%s::int, %s::int) i"
                " on conflict (i) do update set note = excluded.note".encode(),
                (word, low, high - 1),
            )
            rows.update({i: f"{i}{word}" for i in range(low, high)})
        elif kind < 0.75:
            connection.execute(
                f"update {self.table} set note = %s || i where i >= %s and i < %s".encode(), (word, low, high)
            )
            rows.update({i: f"{word}{i}" for i in range(low, high) if i in rows})
        else:
            connection.execute(f"delete from {self.table} where i >= %s and i < %s".encode(), (low, high))
            for i in range(low, high):
                rows.pop(i, None)


def run_round(cluster: LocalCluster, writer: Writer, workers: list[Worker], chance: random.Random) -> None:
    """Load on all tables, until the compute is killed; now and then a page server before it."""
    threads = [threading.Thread(target=worker.run, args=(writer.dsn(),), daemon=True) for worker in workers]
    wanted = sum(worker.transactions for worker in workers) + 60
    for thread in threads:
        thread.start()
    wait_for(
        "60 more transactions",
        lambda: any(worker.failure for worker in workers) or sum(worker.transactions for worker in workers) >= wanted,
        120,
    )
    if chance.random() < 0.5:
        victim = chance.choice(cluster.page_servers)
        victim.kill()
        cluster.restart_page_server(victim, disk=chance.random() < 0.5)
    # At any point of a statement: no test could wait for "the worst moment".
    time.sleep(chance.random() / 2)
    writer.process.kill()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(NO_CACHE, id="no cache"),
        pytest.param(SMALL_CACHE, id="small cache"),
        pytest.param(TINY_LAYERS, id="tiny layers"),
    ],
)
@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("LAKEBASE_ATTACK_SEEDS", "1"))))
def test_every_compute_has_what_was_acknowledged(
    settings: PageServiceSettings, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute after compute on an empty disk: rows, indexes and what amcheck says."""
    if settings is TINY_LAYERS:
        usual = PageServer.configuration

        def with_short_history(server: PageServer) -> str:
            return usual(server) + SHORT_HISTORY

        monkeypatch.setattr(PageServer, "configuration", with_short_history)
    chance = random.Random(seed)
    workers = [Worker(n, seed * 100 + n) for n in range(WORKERS)]
    parameters = {
        "shared_buffers": "1MB",
        "max_connections": "30",
        "autovacuum_naptime": "1s",
        "checkpoint_timeout": "30s",
        "max_wal_size": "32MB",
    }
    with LocalCluster(page_service=replace(settings)) as cluster:
        cluster.expect_log("WARN", "ERROR", "PANIC", "FATAL")
        writer = cluster.start_writer(parameters)
        with writer.connect() as connection:
            connection.execute("create table marker (worker int primary key, sequence int) with (fillfactor = 20)")
            for worker in workers:
                worker.create(connection)
        for _ in range(ROUNDS):
            run_round(cluster, writer, workers, chance)
            writer = cluster.start_writer(parameters)
            with writer.connect() as connection:
                for worker in workers:
                    worker.settle(connection)
                    worker.check(connection)
            amcheck(writer.port, ["postgres"])
        assert sum(worker.transactions for worker in workers) >= 60 * ROUNDS
        if settings is TINY_LAYERS:
            for page_server in cluster.page_servers:
                horizon, first = (lsn_of(page_server.status()[key]) for key in ("horizon_lsn", "durable_lsn"))
                assert 0 < horizon < first
