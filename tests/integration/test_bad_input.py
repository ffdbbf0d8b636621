"""Garbage on every port, and configuration files that are wrong: an error, no crash, no memory, nothing written."""

import os
import random
import re
import socket
import ssl
import subprocess
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from lakebase_testing.admin import AdminClient, Json
from lakebase_testing.cluster import LocalCluster, Safekeeper, lsn_of
from lakebase_testing.environment import environment
from lakebase_testing.waiting import wait_for
from lakebase_testing.wal import assert_safekeepers_equal

# Ten attempts of each kind must not cost more than this; the limit of a frame is 1 MiB (docs/formats/append-protocol.md).
_MEMORY_GROWTH_BYTES = 64 << 20

GARBAGE: dict[str, Callable[[random.Random], bytes]] = {
    "noise": lambda source: source.randbytes(4096),
    "zeros": lambda _: bytes(4096),
    "ones": lambda _: b"\xff" * 4096,
    "huge length": lambda _: b"\xff\xff\xff\x7f" + bytes(64),
    "http": lambda _: b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "endless header": lambda _: b"GET /" + b"a" * 200_000,
    "half a tls record": lambda _: b"\x16\x03\x01\x02\x00\x01\x00",
    "postgresql ssl request, then noise": lambda source: (
        bytes.fromhex("00000008 04d2162f".replace(" ", "")) + source.randbytes(512)
    ),
    "one byte": lambda _: b"\x00",
}


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def files_of(directory: Path) -> dict[str, int]:
    """Names and sizes of everything below a directory."""
    return {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*")}


def decisions_of(safekeeper: Safekeeper) -> list[Json]:
    """What a safekeeper has persisted about its logs, without the positions, which grow by PostgreSQL's own WAL."""
    moving = ("flush_lsn", "commit_lsn", "max_full_xid")
    logs = cast("list[Json]", safekeeper.status()["logs"])
    return [{key: value for key, value in log.items() if key not in moving} for log in logs]


def throw(port: int, data: bytes, context: ssl.SSLContext | None = None) -> None:
    """Sends bytes and waits until the other side closes, or 2 s; being refused is what is expected."""
    try:
        raw = socket.create_connection(("127.0.0.1", port), timeout=2)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") if context else raw as wire:
            wire.sendall(data)
            wire.shutdown(socket.SHUT_WR)
            while wire.recv(65_536):
                pass
    except (OSError, ssl.SSLError):
        return


@contextmanager
def unharmed(safekeeper: Safekeeper) -> Generator[None]:
    """Asserts that what happens inside leaves the process alive, of its size, quiet, and its files untouched."""
    pid = safekeeper.process.pid
    # Spare segments are still being written for a moment after the start.
    wait_for("spare segments", lambda: len(list((safekeeper.data / "spares").glob("*"))) >= 2)
    before, memory, decided = files_of(safekeeper.data), resident_bytes(pid), decisions_of(safekeeper)
    lines = len(safekeeper.process.log_text().splitlines())
    yield
    assert safekeeper.process.is_running
    assert safekeeper.process.pid == pid
    assert decisions_of(safekeeper) == decided
    assert resident_bytes(pid) - memory < _MEMORY_GROWTH_BYTES
    assert files_of(safekeeper.data) == before, "garbage was written"
    grown = len(safekeeper.process.log_text().splitlines()) - lines
    assert grown < 200, f"{grown} log lines for garbage"


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "inside-tls"])
def test_garbage_on_every_port_does_no_harm(encrypted: bool) -> None:
    """Each kind ten times on each port, plain and inside an entitled TLS session."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer()
        assert cluster.authority is not None
        source = random.Random(1)
        victim = cluster.safekeepers[0]
        ports = dict(victim.ports)
        contexts: dict[str, ssl.SSLContext] = {}
        if encrypted:
            contexts = {
                "append": cluster.authority.issue("compute", "mallory").client_context(),
                "admin": cluster.authority.issue("operator", "trudy").client_context(),
            }
            ports = {key: ports[key] for key in contexts}
        with writer.connect() as connection:
            connection.execute("checkpoint")
        cluster.wait_caught_up()
        with unharmed(victim):
            for port in ports:
                for make in GARBAGE.values():
                    for _ in range(10):
                        throw(ports[port], make(source), contexts.get(port))
        for make in GARBAGE.values():
            for port in (writer.admin_port, writer.metrics_port):
                throw(port, make(source))
        with writer.connect() as connection:
            connection.execute("create table still_commits ()")
        end = cluster.wait_caught_up()
        assert_safekeepers_equal(cluster, lsn_of(victim.log_status()["start_lsn"]), end)


def test_calls_with_wrong_contents_get_an_error_that_says_so() -> None:
    """Unknown logs, bodies that are no JSON, unknown keys, another system identifier: 4xx and a text, nothing created."""
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        safekeeper = cluster.safekeepers[0]
        nowhere = f"/v1/logs/{uuid.uuid4()}/{uuid.uuid4()}"
        fence: Json = {"term": 1, "writer": str(uuid.uuid4())}
        good = safekeeper.admin.get(cluster.log_path)
        create: Json = {
            key: good[key]
            for key in ("system_id", "segment_bytes", "start_lsn", "timeline", "max_full_xid", "configuration")
        }
        cases: dict[str, tuple[str, str, Json | str | None]] = {
            "unknown log": ("GET", nowhere, None),
            "fence of an unknown log": ("POST", f"{nowhere}/fence", fence),
            "no UUID": ("GET", "/v1/logs/one/two", None),
            "no JSON": ("POST", f"{cluster.log_path}/fence", "}{"),
            "empty body": ("POST", f"{cluster.log_path}/fence", ""),
            "unknown key": ("POST", f"{cluster.log_path}/fence", {**fence, "force": True}),
            "term 0": ("POST", f"{cluster.log_path}/fence", {**fence, "term": 0}),
            "negative term": ("POST", f"{cluster.log_path}/fence", {**fence, "term": -1}),
            "term that is a text": ("POST", f"{cluster.log_path}/fence", {**fence, "term": "one"}),
            "huge body": ("POST", f"{cluster.log_path}/fence", "x" * (8 << 20)),
            "another system identifier": ("PUT", cluster.log_path, {**create, "system_id": "1"}),
            "another segment size": ("PUT", cluster.log_path, {**create, "segment_bytes": 123}),
            "unknown path": ("GET", "/v2/status", None),
            "unknown method": ("PATCH", "/v1/status", None),
        }
        with unharmed(safekeeper):
            for name, (method, path, body) in cases.items():
                try:
                    reply = safekeeper.admin.call(method, path, body)
                except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
                    # A body above the limit may be refused before all of it was sent.
                    assert name == "huge body"
                    continue
                assert 400 <= reply.status < 500, f"{name}: {reply.status} {reply.text}"
                assert reply.text.strip(), f"{name}: no text"


def test_a_flood_of_half_open_connections_does_not_keep_the_writer_out() -> None:
    """Who has not said who he is costs memory and a descriptor: such connections are few, and the oldest makes room.

    The bound is 256 per core (engine/crates/safekeeper/src/greetings.rs); 500 stay open at their own side.
    """
    with LocalCluster() as cluster:
        cluster.expect_log("WARN")
        writer = cluster.new_writer()
        writer.start()
        flooded = cluster.safekeepers[:2]
        flood: list[socket.socket] = []
        for safekeeper in flooded:
            for _ in range(500):
                connection = socket.create_connection(("127.0.0.1", safekeeper.ports["append"]), timeout=5)
                # The header of a TLS record whose rest never comes.
                connection.sendall(b"\x16\x03\x01\x02\x00")
                connection.setblocking(False)
                flood.append(connection)

        def closed() -> int:
            return sum(is_closed(connection) for connection in flood)

        # The time limit of a greeting, 10 s, would close them later.
        wait_for("those above the bound to be closed", lambda: closed() >= len(flooded) * (500 - 256), 5)
        assert closed() < len(flood)
        cluster.grant(writer)
        writer.wait_running()
        with writer.connect() as session:
            session.execute("create table commits ()")
        for connection in flood:
            connection.close()


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a non-blocking connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_caller_that_fails_again_and_again_is_logged_once() -> None:
    """A broken client tries for ever; a line for each attempt would fill the disk and hide what matters."""
    with LocalCluster(members=1) as cluster:
        cluster.expect_log("WARN")
        writer = cluster.start_writer()
        assert cluster.authority is not None
        entitled = cluster.authority.issue("operator", "trudy").client_context()
        for port, process in (
            (cluster.safekeepers[0].ports["admin"], cluster.safekeepers[0].process),
            (writer.admin_port, writer.process),
        ):
            for _ in range(20):
                throw(port, GARBAGE["http"](random.Random(1)))
                throw(port, GARBAGE["endless header"](random.Random(1)), entitled)
            lines = [line for line in process.log_text().splitlines() if "HTTP connection ended" in line]
            assert len(lines) == 2, f"one for the handshake, one for the header expected: {lines}"


def test_the_same_log_created_again_is_no_error_and_no_change() -> None:
    """The operator repeats steps after a crash of its own."""
    with LocalCluster() as cluster:
        before = [safekeeper.log_status() for safekeeper in cluster.safekeepers]
        cluster.create_log()
        assert [safekeeper.log_status() for safekeeper in cluster.safekeepers] == before


def run_config(subcommand: str, text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Starts a process with a configuration; it must end by itself."""
    file = directory / f"{subcommand}.toml"
    file.write_text(text)
    command = [str(environment().lakebase), subcommand, "--config", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, env={**os.environ})


SAFEKEEPER_MISTAKES = {
    "unknown key": ("member = 1", "member = 1\nmembr = 2", "membr"),
    "unknown section": ("[disk]", "[disc]", "disc"),
    "member 0": ("member = 1", "member = 0", "member"),
    "bad size": ('headroom = "16MiB"', 'headroom = "much"', "headroom"),
    "bad port": ('admin = "127.0.0.1:', 'admin = "127.0.0.1:9', "admin"),
    "no tls mode": ('mode = "required"', "", "mode"),
    "off without saying so": ('mode = "required"', 'mode = "off"', "insecure"),
    "missing file": ("ca.pem", "nowhere.pem", "nowhere.pem"),
    "no toml": ("[listen]", "[listen", "listen"),
}


@pytest.mark.parametrize("mistake", SAFEKEEPER_MISTAKES)
def test_a_wrong_safekeeper_configuration_is_refused_by_name(mistake: str, tmp_path: Path) -> None:
    """The message names what to correct; the process does not start half-way."""
    find, replace, expected = SAFEKEEPER_MISTAKES[mistake]
    cluster = LocalCluster(members=1)
    good = cluster.safekeepers[0].configuration()
    assert find in good

    result = run_config("safekeeper", good.replace(find, replace, 1), tmp_path)

    assert result.returncode != 0
    assert expected in result.stdout + result.stderr
    assert "panicked" not in result.stderr
    assert not cluster.safekeepers[0].data.exists(), "data was created under a wrong configuration"
    cluster.remove()


COMPUTE_MISTAKES = {
    "unknown key": ("[listen]", "[listen]\nweb = 1", "web"),
    "no uuid": ('writer = "', 'writer = "x', "writer"),
    "no such bin_dir": ("bin_dir = ", 'bin_dir = "/nonexistent" # ', "/nonexistent"),
    "fixed setting": ("[postgres.parameters]", '[postgres.parameters]\nfsync = "off"', "fsync"),
    "member twice": ("member = 2", "member = 1", "twice"),
    "no such library": ("vfs_library = ", 'vfs_library = "/nonexistent.so" # ', "/nonexistent.so"),
    "no such base backup": ("base_backup = ", 'base_backup = "/nonexistent" # ', "/nonexistent"),
}


@pytest.mark.parametrize("mistake", COMPUTE_MISTAKES)
def test_a_wrong_compute_configuration_is_refused_by_name(mistake: str, tmp_path: Path) -> None:
    """The same for the agent: nothing of PostgreSQL runs."""
    find, replace, expected = COMPUTE_MISTAKES[mistake]
    cluster = LocalCluster()
    good = cluster.new_writer().configuration()
    assert find in good

    result = run_config("compute", good.replace(find, replace, 1), tmp_path)

    assert result.returncode != 0
    assert expected in result.stdout + result.stderr
    assert "panicked" not in result.stderr
    cluster.remove()


def test_the_admin_port_answers_others_while_one_is_slow() -> None:
    """A caller that sends a header byte by byte holds its own connection only."""
    with LocalCluster(members=1) as cluster:
        cluster.expect_log("WARN")
        assert cluster.operator is not None
        port = cluster.safekeepers[0].ports["admin"]
        slow = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"\x16")
        assert AdminClient(port, cluster.operator, timeout_seconds=3).get("/v1/status")
        for connection in slow:
            connection.close()
