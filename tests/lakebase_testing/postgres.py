"""Stock PostgreSQL beside the cluster: base backups, followers, and how to run its programs as its user."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psycopg

from lakebase_testing.environment import environment, give_to_postgres, is_root, postgres_owner, scratch
from lakebase_testing.ports import free_port
from lakebase_testing.process import Process
from lakebase_testing.waiting import wait_for

Connection = psycopg.Connection[tuple[Any, ...]]


def run_as_postgres(
    program: str,
    *arguments: str,
    check: bool = True,
    timeout_seconds: float = 300,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs one of PostgreSQL's programs as its user; returns status and output.

    Raises: AssertionError with the output where `check` is set and the program fails.
    """
    as_user: dict[str, Any] = {}
    if is_root():
        owner = postgres_owner()
        as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    result: subprocess.CompletedProcess[str] = subprocess.run(
        [str(environment().postgres_bin / program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_seconds,
        cwd="/",
        # HOME: libpq would look for certificates and passwords in the caller's.
        env={**os.environ, "HOME": "/nonexistent", **(env or {})},
        **as_user,
    )
    assert not check or result.returncode == 0, f"{program} {arguments}: {result.stdout}{result.stderr}"
    return result


@cache
def _templates() -> Path:
    """A directory for base backups, shared by all tests of this run; removed at its end by `remove_templates`."""
    return give_to_postgres(scratch("base"))


@cache
def base_backup(segment_mib: int = 16, name: str = "base") -> Path:
    """Returns a cleanly shut down PGDATA fresh from initdb (checksums on); another `name` is another system identifier."""
    directory = _templates() / f"{name}-{segment_mib}"
    if directory.exists():
        # Made for another spelling of the same arguments, which the cache takes for others.
        return directory
    run_as_postgres(
        "initdb", "--pgdata", str(directory), "--username=postgres", "--auth=trust", "--data-checksums",
        "--encoding=UTF8", "--locale=C", "--no-instructions", f"--wal-segsize={segment_mib}",
    )  # fmt: skip
    return directory


def remove_templates() -> None:
    """Removes what `base_backup` made."""
    if _templates.cache_info().currsize:
        shutil.rmtree(_templates())
        _templates.cache_clear()
        base_backup.cache_clear()


def copy_tree(source: Path, target: Path) -> Path:
    """Copies a PGDATA, owner and modes included; returns the copy."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    return target


@dataclass
class StockServer:
    """An ordinary PostgreSQL: a standby that follows the safekeepers, or a server that stands for itself."""

    directory: Path
    port: int
    process: Process

    @staticmethod
    def create(
        directory: Path,
        backup: Path,
        *,
        primary_conninfo: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> "StockServer":
        """Makes (does not start) a server in `directory` from `backup`; with `primary_conninfo` it is a standby."""
        give_to_postgres(directory)
        data = copy_tree(backup, directory / "data")
        port = free_port()
        lines = {
            "port": str(port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "wal_retrieve_retry_interval": "200ms",
            "fsync": "off",
            **(settings or {}),
        }
        if primary_conninfo is not None:
            (data / "standby.signal").touch()
            give_to_postgres(data / "standby.signal")
            lines["primary_conninfo"] = " ".join(f"{key}={value}" for key, value in primary_conninfo.items())
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{key} = '{value}'\n" for key, value in lines.items())
        process = Process(
            name="stock-postgres",
            command=[str(environment().postgres_bin / "postgres"), "-D", str(data)],
            log=directory / "postgres.log",
            user=environment().postgres_user if is_root() else None,
            environment={"HOME": "/nonexistent"},
        )
        return StockServer(directory, port, process)

    @property
    def data(self) -> Path:
        """PGDATA."""
        return self.directory / "data"

    def dsn(self, database: str = "postgres") -> str:
        """Connection string of the superuser."""
        return f"host=127.0.0.1 port={self.port} user=postgres dbname={database} connect_timeout=5"

    def start(self, timeout_seconds: float = 60) -> None:
        """Starts the server and waits until it answers."""
        self.process.start()
        wait_for("stock PostgreSQL to answer", self._answers, timeout_seconds)

    def _answers(self) -> bool:
        assert self.process.is_running, f"stock PostgreSQL ended:\n{self.process.log_text()[-4000:]}"
        try:
            psycopg.connect(self.dsn()).close()
        except psycopg.OperationalError:
            return False
        return True

    def connect(self, database: str = "postgres") -> Connection:
        """Opens a connection in autocommit mode."""
        return psycopg.connect(self.dsn(database), autocommit=True)

    def stop(self) -> None:
        """Stops the server (fast shut-down)."""
        if self.process.is_running:
            import signal

            os.kill(self.process.pid, signal.SIGINT)
            self.process.wait_end()

    def replayed(self) -> int:
        """Returns the replay position."""
        with self.connect() as connection:
            row = connection.execute("select pg_last_wal_replay_lsn()::text").fetchone()
        assert row is not None
        return parse_lsn(row[0]) if row[0] else 0


def promoted_backup(directory: Path, promotions: int) -> Path:
    """Returns a cleanly shut down PGDATA whose last WAL segment begins on timeline 1 and ends on a later one.

    A server without a primary is started as a standby and promoted, `promotions` times; each writes a few records.
    """
    server = StockServer.create(directory, base_backup(), primary_conninfo={})
    for _ in range(promotions):
        (server.data / "standby.signal").touch()
        give_to_postgres(server.data / "standby.signal")
        server.start()
        with server.connect() as connection:
            connection.execute("select pg_promote()")
            connection.execute("select pg_create_restore_point('promoted')")
        server.stop()
    return server.data


def value(connection: Connection, statement: str) -> object:
    """Returns the only column of a statement's only row."""
    row = connection.execute(statement.encode()).fetchone()
    assert row is not None, f"{statement}: no row"
    return row[0]


def number(connection: Connection, statement: str) -> int:
    """Returns the number that is the only column of a statement's only row."""
    return int(str(value(connection, statement)))


def parse_lsn(text: str) -> int:
    """Parses `HIGH/LOW`."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def format_lsn(lsn: int) -> str:
    """Writes `HIGH/LOW` as PostgreSQL does."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def segment_name(timeline: int, lsn: int, segment_bytes: int) -> str:
    """Returns the name of the WAL segment that holds `lsn` (xlog_internal.h, XLogFileName)."""
    number = lsn // segment_bytes
    per_id = (1 << 32) // segment_bytes
    return f"{timeline:08X}{number // per_id:08X}{number % per_id:08X}"


def quote_conninfo(parameters: Mapping[str, str]) -> str:
    """Writes a libpq connection string."""
    return " ".join(f"{key}={value}" for key, value in parameters.items())


def amcheck(port: int, databases: Sequence[str]) -> None:
    """Asserts that every table and index of the databases is sound (heap against index included)."""
    for database in databases:
        with psycopg.connect(
            f"host=127.0.0.1 port={port} user=postgres dbname={database}", autocommit=True
        ) as connection:
            connection.execute("create extension if not exists amcheck")
        run_as_postgres(
            "pg_amcheck", "--host=127.0.0.1", f"--port={port}", "--username=postgres", f"--database={database}",
            "--heapallindexed", "--checkunique",
        )  # fmt: skip
