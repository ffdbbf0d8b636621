"""A lakebase of real processes on this machine: safekeepers, page servers, and one writer after the other.

    with LocalCluster() as cluster:
        writer = cluster.start_writer()
        with writer.connect() as connection: ...
        cluster.safekeepers[0].kill()
        writer = cluster.start_writer()

With `page_service` writers start on an empty disk and read pages from page servers, otherwise from a base backup. Leaving
the block ends all processes by their ids, fails if any was left over by an agent that ended, and fails if a log reports
trouble that the test did not announce with `expect_log`.
"""

import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import psycopg

from lakebase_operator import naming
from lakebase_testing import procfs
from lakebase_testing.admin import AdminClient, Json, figure
from lakebase_testing.certificates import Authority, Credentials
from lakebase_testing.environment import environment, give_to_postgres, is_root, postgres_owner, scratch
from lakebase_testing.faults import without_io_uring
from lakebase_testing.page_service import (
    PageServer,
    PageServiceSettings,
    compute_section,
    object_directory,
    storage_url,
)
from lakebase_testing.ports import free_port
from lakebase_testing.postgres import Connection, base_backup
from lakebase_testing.process import Process
from lakebase_testing.waiting import wait_for

NAME = "demo"
# What a cluster is made of; nothing else is ever looked for, or ended, among the machine's processes.
_PROGRAMS = frozenset({"lakebase", "postgres", "pg_receivewal"})


class Safekeeper:
    """One safekeeper process and its data."""

    def __init__(self, cluster: "LocalCluster", ordinal: int, wrapper: Sequence[str] = ()) -> None:
        self.member = ordinal + 1
        self.name = naming.safekeeper(NAME, ordinal)
        self.directory = cluster.directory / self.name
        self.directory.mkdir()
        self.data = self.directory / "data"
        self.ports = {key: free_port() for key in ("append", "replication", "admin", "metrics")}
        self.config = self.directory / "safekeeper.toml"
        self._cluster = cluster
        self.admin = AdminClient(self.ports["admin"], cluster.operator)
        self.config.write_text(self.configuration())
        self.process = Process(
            name=self.name,
            command=[str(environment().lakebase), "safekeeper", "--config", str(self.config)],
            log=self.directory / "log",
            user=cluster.user,
            wrapper=wrapper,
        )
        cluster.adopt(self.directory)

    def configuration(self) -> str:
        """The text of safekeeper.toml."""
        listen = "\n".join(f'{key} = "127.0.0.1:{port}"' for key, port in self.ports.items())
        # Without TLS, and so without certificates, the agent's own WAL receiver could show nobody but a password.
        service = self._cluster.page_service
        archive = f'[archive]\nobject_storage = "{self._cluster.object_storage}"' if service and service.archive else ""
        users = f'users_file = "{self._cluster.directory / "users"}"' if self._cluster.operator else ""
        return f"""
member = {self.member}
data_dir = "{self.data}"
cores = 1

[listen]
{listen}

[tls]
{self._cluster.tls("safekeeper", self.name)}

[disk]
headroom = "{self._cluster.headroom}"
spare_segments = 2

[replication]
{users}

{archive}
"""

    def start(self) -> None:
        """Starts the process and waits until its admin port answers."""
        self.process.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until the admin port answers."""

        def answers() -> Json | None:
            assert self.process.is_running, f"{self.name} ended:\n{self.process.log_text()[-4000:]}"
            return self.admin.try_get("/v1/status")

        wait_for(f"{self.name} to answer", answers, 60)

    def kill(self) -> None:
        """Kills the process (SIGKILL)."""
        self.process.kill()

    def status(self) -> Json:
        """What the safekeeper says about itself."""
        return self.admin.get("/v1/status")

    def log_status(self) -> Json:
        """What it says about the cluster's log: the acceptor's state."""
        return self.admin.get(self._cluster.log_path)

    def wal_directory(self) -> Path:
        """Where its segments are."""
        return self.data / "logs" / self._cluster.id / self._cluster.branch / "wal"


class Writer:
    """One compute agent with the PostgreSQL that it runs."""

    def __init__(
        self, cluster: "LocalCluster", ordinal: int, parameters: Mapping[str, str], wrapper: Sequence[str]
    ) -> None:
        self.name = naming.compute(NAME, ordinal)
        self.id = str(uuid.uuid4())
        self.term = 0
        self.directory = cluster.directory / self.name
        self.directory.mkdir()
        self.data = self.directory / "data"
        self.port = free_port()
        self.admin_port = free_port()
        self.metrics_port = free_port()
        self.config = self.directory / "compute.toml"
        self._cluster = cluster
        self._parameters = parameters
        self.admin = AdminClient(self.admin_port, cluster.operator)
        self.config.write_text(self.configuration())
        self.process = Process(
            name=self.name,
            command=[str(environment().lakebase), "compute", "--config", str(self.config)],
            log=self.directory / "log",
            user=cluster.user,
            wrapper=wrapper,
        )
        cluster.adopt(self.directory)

    @property
    def pgdata(self) -> Path:
        """PGDATA of its PostgreSQL."""
        return self.data / "pgdata"

    @property
    def postgres_log(self) -> Path:
        """The log of its PostgreSQL."""
        return self.data / "postgres.log"

    def configuration(self) -> str:
        """The text of compute.toml."""
        cluster = self._cluster
        parameters = "\n".join(f'"{key}" = "{value}"' for key, value in self._parameters.items())
        members = "\n".join(
            f"[[safekeepers]]\nmember = {sk.member}\n"
            f'append = "127.0.0.1:{sk.ports["append"]}"\nreplication = "127.0.0.1:{sk.ports["replication"]}"\n'
            for sk in cluster.safekeepers
        )
        user = f'user = "{environment().postgres_user}"' if cluster.user is None and is_root() else ""
        base = f'base_backup = "{cluster.base_backup}"' if cluster.page_service is None else ""
        pages = compute_section(cluster.page_service, cluster.page_servers) if cluster.page_service else ""
        return f"""
cluster = "{cluster.id}"
branch = "{cluster.branch}"
writer = "{self.id}"
data_dir = "{self.data}"
{base}
lease_wait_timeout = "{cluster.lease_wait_timeout}"

[postgres]
bin_dir = "{environment().postgres_bin}"
{user}
listen_addresses = "127.0.0.1"
port = {self.port}
vfs_library = "{environment().vfs}"

[postgres.parameters]
{parameters}

{members}
{pages}
[listen]
admin = "127.0.0.1:{self.admin_port}"
metrics = "127.0.0.1:{self.metrics_port}"

[tls]
{cluster.tls("compute", self.name)}
"""

    def dsn(self, database: str = "postgres") -> str:
        """Connection string of the superuser."""
        return f"host=127.0.0.1 port={self.port} user=postgres dbname={database} connect_timeout=5"

    def connect(self, database: str = "postgres") -> Connection:
        """Opens a connection in autocommit mode."""
        return psycopg.connect(self.dsn(database), autocommit=True)

    def status(self) -> Json:
        """What the agent says about itself."""
        return self.admin.get("/v1/status")

    def figure(self, name: str) -> int:
        """One of its metrics."""
        return int(figure(self.metrics_port, name))

    def state(self) -> str | None:
        """Its state, or None when it does not answer."""
        status = self.admin.try_get("/v1/status")
        return None if status is None else str(status["state"])

    def start(self) -> None:
        """Starts the agent (which then waits for a grant) and waits until its admin port answers."""
        self.process.start()
        wait_for(f"{self.name} to answer", lambda: self._alive() and self.state(), 60)

    def wait_running(self, timeout_seconds: float = 60) -> None:
        """Waits until PostgreSQL accepts statements under this writer's term."""

        def running() -> bool:
            assert self._alive()
            state = self.state()
            assert state not in ("failed", "fenced"), f"{self.name} is {state}:\n{self.process.log_text()[-4000:]}"
            return state == "running"

        wait_for(f"{self.name} to run", running, timeout_seconds)

    def _alive(self) -> bool:
        assert self.process.is_running, f"{self.name} ended:\n{self.process.log_text()[-4000:]}"
        return True

    def postgres_pids(self) -> list[int]:
        """Returns all processes of its PostgreSQL."""
        return [
            pid
            for pid in procfs.descendants(self.process.pid)
            if procfs.command_line(pid).startswith(("postgres", str(environment().postgres_bin)))
        ]

    def stop_cleanly(self) -> None:
        """Stops PostgreSQL and the agent (SIGTERM), as at a planned switch."""
        status = self.process.stop(timeout_seconds=120)
        assert status == 0, f"{self.name} ended with {status}:\n{self.process.log_text()[-4000:]}"


class LocalCluster:
    """Safekeepers, page servers, an operator's certificate, and writers."""

    def __init__(
        self,
        *,
        members: int = 3,
        segment_mib: int = 16,
        tls: bool = True,
        user: str | None = None,
        wrapper: Sequence[str] = (),
        headroom: str = "16MiB",
        lease_wait_timeout: str = "60s",
        backup: Path | None = None,
        page_service: PageServiceSettings | None = None,
    ) -> None:
        """Describes a cluster; entering the `with` block starts its safekeepers and creates its log.

        backup: what it begins with, a cleanly shut down PGDATA. page_service: it is imported, page servers are started, too,
        and writers start on an empty disk; without, each writer starts from a copy of it.

        user: whom all processes run as (only as root); wrapper: command line put before each of them. With
        LAKEBASE_FORBID_IO_URING=1 in the environment, io_uring is forbidden to all of them.
        """
        self.directory = scratch("cluster")
        self.id = str(uuid.uuid4())
        self.branch = str(uuid.uuid4())
        self.user = user
        forbid = os.environ.get("LAKEBASE_FORBID_IO_URING") == "1" and not wrapper
        self.wrapper = without_io_uring() if forbid else list(wrapper)
        self.headroom = headroom
        self.lease_wait_timeout = lease_wait_timeout
        self.segment_bytes = segment_mib << 20
        self.base_backup = backup or base_backup(segment_mib)
        self.term = 0
        self.writers: list[Writer] = []
        self.processes: list[Process] = []
        self.expected: list[re.Pattern[str]] = []
        if forbid:
            self.expect_log("io_uring is forbidden or absent here")
        self._tls = tls
        self.authority = Authority(self.directory / "certificates", self.id) if tls else None
        self.operator = self.authority.issue("operator", "operator") if self.authority else None
        (self.directory / "users").touch()
        self.page_service = page_service
        self.object_storage = "" if page_service is None else storage_url(page_service.object_storage, self.directory)
        self.page_servers: list[PageServer] = []
        self.safekeepers: list[Safekeeper] = []
        self._all_safekeepers: list[Safekeeper] = []
        for _ in range(members):
            self.add_safekeeper()
        if page_service is not None:
            shards = range(page_service.shards)
            self.page_servers = [PageServer(self, NAME, shard, page_service) for shard in shards]

    # --- Life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            for safekeeper in self.safekeepers:
                safekeeper.process.start()
            for safekeeper in self.safekeepers:
                safekeeper.wait_ready()
            if self.page_service is not None:
                self.import_backup(self.page_service)
            self.create_log()
            for page_server in self.page_servers:
                page_server.start()
            for page_server in self.page_servers:
                page_server.wait_ready()
        except BaseException:
            self._end_processes()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self._end_processes()
        if kind is not None:
            print(self.report())
            return
        assert not left, f"processes outlived their parent: {left}"
        trouble = [f"{p.name}: {line}" for p in self._all_processes() for line in p.suspicious_lines(self.expected)]
        trouble += [
            f"{writer.name} PostgreSQL: {line}"
            for writer in self.writers
            if writer.postgres_log.exists()
            for line in writer.postgres_log.read_text(errors="replace").splitlines()
            if "PANIC" in line and not any(pattern.search(line) for pattern in self.expected)
        ]
        assert not trouble, "unexpected log lines:\n" + "\n".join(trouble[:40])
        self.remove()

    def remove(self) -> None:
        """Removes the files of a cluster that does not run."""
        shutil.rmtree(self.directory)

    def _all_processes(self) -> list[Process]:
        return [
            *(writer.process for writer in self.writers),
            *self.processes,
            *(page_server.process for page_server in self.page_servers),
            *(safekeeper.process for safekeeper in self._all_safekeepers),
        ]

    def _end_processes(self) -> list[str]:
        """Ends everything; returns the command lines of processes that an ended parent left behind."""
        for process in self._all_processes():
            if process.is_running:
                process.feed()
                tree = process.tree()
                for pid in tree:
                    procfs.send_signal(pid, signal.SIGCONT)
                process.kill()
        # A killed agent takes PostgreSQL with it; the kernel needs a moment for many backends.
        try:
            wait_for("the end of all children", lambda: not procfs.users_of(self.directory, _PROGRAMS), 15)
        except AssertionError:
            left = {pid: procfs.command_line(pid) for pid in procfs.users_of(self.directory, _PROGRAMS)}
            for pid in left:
                procfs.send_signal(pid, signal.SIGKILL)
            return list(left.values())
        return []

    def report(self, lines: int = 60) -> str:
        """Returns the ends of all logs: what a failed test shows."""
        parts: list[str] = [f"--- files are kept in {self.directory}"]
        for process in self._all_processes():
            parts.append(f"--- {process.name}")
            parts.extend(process.log_text().splitlines()[-lines:])
        for writer in self.writers:
            if writer.postgres_log.exists():
                parts.append(f"--- {writer.name} PostgreSQL")
                parts.extend(writer.postgres_log.read_text(errors="replace").splitlines()[-lines:])
        return "\n".join(parts)

    def expect_log(self, *patterns: str) -> None:
        """Announces trouble that this test provokes: log lines that match are no failure."""
        self.expected.extend(re.compile(pattern) for pattern in patterns)

    def adopt(self, directory: Path) -> None:
        """Gives a member's directory to the user that its process runs as."""
        if self.user is not None and is_root():
            shutil.chown(directory, self.user, self.user)
            for path in directory.iterdir():
                shutil.chown(path, self.user, self.user)

    def tls(self, role: str, name: str) -> str:
        """Issues a member's certificate; returns the lines of its `[tls]` section."""
        if self.authority is None:
            return 'mode = "off"\ni_know_this_is_insecure = true'
        made = self.authority.issue(role, name)
        if self.user is not None and is_root():
            shutil.chown(made.key, self.user, self.user)
        return f'mode = "required"\nca = "{made.ca}"\ncertificate = "{made.certificate}"\nkey = "{made.key}"'

    # --- The operator's commands --------------------------------------------------------------------------------

    @property
    def log_path(self) -> str:
        """Path of the cluster's log on an admin port."""
        return f"/v1/logs/{self.id}/{self.branch}"

    def command(
        self, *arguments: str, check: bool = True, tls: bool = True, timeout_seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Runs `lakebase ARGUMENTS`, with the operator's certificate unless `tls` is unset; returns status and output."""
        certificate: list[str] = []
        if tls and self.authority is not None and self.operator is not None:
            certificate = ["--tls-dir", str(self.authority.directory), "--tls-name", self.operator.name]
        line = [str(environment().lakebase), *arguments, *certificate]
        result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=timeout_seconds)
        assert not check or result.returncode == 0, f"{' '.join(line)}:\n{result.stdout}{result.stderr}"
        return result

    def safekeeper_arguments(self, safekeepers: Sequence[Safekeeper] | None = None) -> list[str]:
        """The command-line arguments that name the safekeepers' admin ports."""
        return [
            argument
            for safekeeper in (self.safekeepers if safekeepers is None else safekeepers)
            for argument in ("--safekeeper", safekeeper.admin.url)
        ]

    def log_arguments(self) -> list[str]:
        """The command-line arguments that name the cluster's log."""
        return ["--cluster", self.id, "--branch", self.branch]

    def import_backup(self, settings: PageServiceSettings) -> None:
        """Makes the cluster's first layers out of the base backup."""
        self.command(
            "import", "--from-pgdata", str(self.base_backup), "--object-storage", self.object_storage,
            *self.log_arguments(), "--shards", str(settings.shards), "--stripe-blocks", str(settings.stripe_blocks),
            tls=False, timeout_seconds=600,
        )  # fmt: skip
        if self.user is not None and is_root() and settings.object_storage == "file":
            subprocess.run(["chown", "-R", f"{self.user}:", str(self.directory / "objects")], check=True)

    def export(self, target: Path, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Writes the database to an ordinary PGDATA, which belongs to PostgreSQL's user; returns status and output."""
        shards = [f"--shard={server.shard}=127.0.0.1:{server.ports['pages']}" for server in self.page_servers]
        result = self.command(
            "export", "--to", str(target), "--object-storage", self.object_storage, *self.log_arguments(), *shards, *options,
            check=check, timeout_seconds=600,
        )  # fmt: skip
        if is_root() and target.exists():
            owner = postgres_owner()
            subprocess.run(["chown", "-R", f"{owner.pw_uid}:{owner.pw_gid}", str(target)], check=True)
        return result

    def create_log(self) -> None:
        """Creates the log on all safekeepers, from the base backup or from what was imported."""
        source = ["--base-backup", str(self.base_backup)]
        if self.page_service is not None:
            source = ["--from-store", self.object_storage]
        self.command("log", "create", *self.safekeeper_arguments(), *self.log_arguments(), *source)

    def fence(self, term: int, writer: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Fences all earlier writers: `term` belongs to `writer` from now on."""
        arguments = ["--term", str(term), "--writer", writer]
        return self.command("fence", *self.safekeeper_arguments(), *self.log_arguments(), *arguments, check=check)

    def grant(self, writer: Writer, *, new_term: bool = True) -> None:
        """Gives the writer the next term (or its own again): fence, then grant."""
        if new_term:
            self.term += 1
            writer.term = self.term
        self.fence(writer.term, writer.id)
        self.command("grant", "--compute", writer.admin.url, "--term", str(writer.term))

    # --- Writers ------------------------------------------------------------------------------------------------

    def new_writer(self, parameters: Mapping[str, str] | None = None, wrapper: Sequence[str] | None = None) -> Writer:
        """Describes another compute; it has no data and is not started."""
        writer = Writer(self, len(self.writers), parameters or {}, self.wrapper if wrapper is None else wrapper)
        self.writers.append(writer)
        return writer

    def start_writer(self, parameters: Mapping[str, str] | None = None, timeout_seconds: float = 60) -> Writer:
        """Starts a new compute under the next term and waits until it runs."""
        writer = self.new_writer(parameters)
        writer.start()
        self.grant(writer)
        writer.wait_running(timeout_seconds)
        return writer

    def restart_page_server(self, page_server: PageServer, *, disk: bool) -> None:
        """Starts an ended page server as the next generation of its shard, with its local files or without."""
        if not disk:
            page_server.lose_disk()
        page_server.start()
        page_server.wait_ready()

    def restart_writer(self, writer: Writer, timeout_seconds: float = 60) -> None:
        """Starts an ended compute again: same writer, same term, next attempt."""
        writer.start()
        if writer.state() == "waiting_for_grant":
            self.grant(writer, new_term=False)
        writer.wait_running(timeout_seconds)

    # --- The state of the log ---------------------------------------------------------------------------------------

    def add_safekeeper(self) -> Safekeeper:
        """Describes one more safekeeper; it is not started, and no member of the log."""
        safekeeper = Safekeeper(self, len(self._all_safekeepers), self.wrapper)
        self._all_safekeepers.append(safekeeper)
        self.safekeepers.append(safekeeper)
        return safekeeper

    @property
    def objects(self) -> Path:
        """Where the objects of the cluster's branch are as files."""
        assert self.page_service is not None
        return object_directory(self.page_service.object_storage, self.directory) / self.id / self.branch

    def majority(self) -> int:
        """How many safekeepers make a quorum."""
        return len(self.safekeepers) // 2 + 1

    def positions(self, key: str = "flush_lsn") -> list[int]:
        """Returns a position that each safekeeper reports for the log."""
        return [lsn_of(safekeeper.log_status()[key]) for safekeeper in self.safekeepers]

    def wait_caught_up(self, timeout_seconds: float = 60) -> int:
        """Waits until all safekeepers hold and know the same committed log; returns its end."""

        def equal() -> int | None:
            positions = {*self.positions("flush_lsn"), *self.positions("commit_lsn")}
            return positions.pop() if len(positions) == 1 else None

        return wait_for("all safekeepers to hold the same log", equal, timeout_seconds)

    def wait_ingested(self, lsn: int, timeout_seconds: float = 60) -> None:
        """Waits until pages as of `lsn` can be read from all page servers."""
        for page_server in self.page_servers:
            wait_for(
                f"{page_server.name} to ingest {lsn:#x}",
                lambda page_server=page_server: lsn_of(page_server.status()["ingested_lsn"]) >= lsn,
                timeout_seconds,
            )

    def replication_parameters(self, credentials: Credentials | None, *safekeepers: Safekeeper) -> dict[str, str]:
        """libpq parameters that reach the safekeepers' PostgreSQL ports."""
        chosen = safekeepers or tuple(self.safekeepers)
        return {
            "host": ",".join("127.0.0.1" for _ in chosen),
            "port": ",".join(str(safekeeper.ports["replication"]) for safekeeper in chosen),
            "user": "lakebase",
            "connect_timeout": "5",
            **(credentials.libpq() if credentials else {"sslmode": "disable"}),
        }

    def follower(self, name: str = "follower") -> Credentials | None:
        """A follower's certificate whose key PostgreSQL's programs can read."""
        if self.authority is None:
            return None
        give_to_postgres(self.authority.directory)
        self.authority.directory.chmod(0o755)
        return self.authority.issue_for_postgres("follower", name)

    def add_process(self, process: Process) -> Process:
        """Lets the cluster end a process (a follower, a proxy) with its own."""
        self.processes.append(process)
        return process


def lsn_of(value: object) -> int:
    """Reads a position from JSON: a number, or PostgreSQL's text."""
    if isinstance(value, int):
        return value
    high, low = cast("str", value).split("/")
    return int(high, 16) << 32 | int(low, 16)
