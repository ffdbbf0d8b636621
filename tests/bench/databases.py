"""Stopped databases of stock PostgreSQL that lakebases begin with, and what a row has to know about them."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.servers import initialise
from lakebase_testing.environment import scratch
from lakebase_testing.postgres import Connection, StockServer, base_backup, number

# Nothing is written but by the load: neither a checkpoint nor the background writer nor a vacuum comes between.
QUIET = {
    "shared_buffers": "1GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "bgwriter_lru_maxpages": "0",
    "autovacuum": "off",
    "jit": "off",
}


@dataclass(frozen=True)
class Relation:
    """A relation as the page protocol names it."""

    tablespace: int
    database: int
    number: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.tablespace}/{self.database}/{self.number}"


@dataclass(frozen=True)
class Database:
    """A PGDATA that was shut down cleanly, with pgbench's tables."""

    data: Path
    accounts: Relation
    scale: int
    # Of all databases.
    bytes: int


def relation(connection: Connection, name: str) -> Relation:
    """Looks a relation of the default tablespace up."""
    database = number(connection, "select oid from pg_database where datname = current_database()")
    file = number(connection, f"select pg_relation_filenode('{name}')")
    blocks = number(connection, f"select pg_relation_size('{name}') / 8192")
    return Relation(1663, database, file, blocks)


@contextmanager
def pgbench_database(scale: int, statements: tuple[str, ...] = ()) -> Generator[Database]:
    """Makes a database with pgbench's tables, runs statements in it, and stops it; removed at the end of the block."""
    directory = scratch("database")
    server = StockServer.create(directory, base_backup(), settings=QUIET)
    try:
        server.start()
        initialise([server.port], scale)
        with server.connect() as connection:
            for statement in statements:
                connection.execute(statement.encode())
            accounts = relation(connection, "pgbench_accounts")
            size = number(connection, "select sum(pg_database_size(oid)) from pg_database")
        server.stop()
        yield Database(server.data, accounts, scale, size)
    finally:
        if server.process.is_running:
            server.process.kill()
        shutil.rmtree(directory)
