"""Who may call what: every wrong pair of role and call is refused, and so is every other cluster's certificate.

The table is the one in docs/certificates.md; the calls are made over the wire against running processes.
"""

import socket
import ssl
import uuid
from pathlib import Path
from typing import cast

import pytest

from lakebase_testing.admin import AdminClient, Json
from lakebase_testing.certificates import Authority
from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.waiting import wait_for

ROLES = ("operator", "safekeeper", "compute", "pageserver", "follower", "client")
ONE_SHARD = PageServiceSettings(shards=1)
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "certificates.md"


def documented() -> dict[str, set[str]]:
    """Returns, for each call in the document's table, the roles that may make it."""
    rows: dict[str, set[str]] = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(ROLES) + 2 and set(cells[1:-1]) <= {"yes", "no"}:
            rows[cells[0]] = {role for role, cell in zip(ROLES, cells[1:-1], strict=True) if cell == "yes"}
    return rows


def calls(cluster: LocalCluster, writer: Writer) -> dict[str, tuple[int, str, str, Json | None]]:
    """Returns, for each HTTP call of the table: port, method, path, body. Allowed ones do no harm here."""
    log, port, agent = cluster.log_path, cluster.safekeepers[0].ports["admin"], writer.admin_port
    other = f"/v1/logs/{cluster.id}/{uuid.uuid4()}"
    fence: Json = {"term": 1, "writer": writer.id}
    status = cluster.safekeepers[0].log_status()
    keys = ("system_id", "segment_bytes", "start_lsn", "timeline", "max_full_xid", "configuration")
    create = {key: status[key] for key in keys}
    configuration = cast("Json", status["configuration"])
    (pages,) = cluster.page_servers
    shard: Json = {
        "shard": pages.shard,
        "generation": 0,
        "begin": pages.begin,
        "end": pages.end,
        "pages": f"127.0.0.1:{pages.reached_at}",
    }
    return {
        "safekeeper status": (port, "GET", "/v1/status", None),
        "create log": (port, "PUT", other, create),
        "delete log": (port, "DELETE", other, None),
        "fence": (port, "POST", f"{log}/fence", fence),
        "change membership": (port, "PUT", f"{log}/membership", configuration),
        "compute status": (agent, "GET", "/v1/status", None),
        "grant": (agent, "POST", "/v1/grant", fence),
        "replace shards": (agent, "PUT", "/v1/shards", {"version": 1, "shards": [shard]}),
        "page server status": (pages.ports["admin"], "GET", "/v1/status", None),
        "tend layers": (pages.ports["admin"], "POST", "/v1/freeze", None),
        "stop compute": (agent, "POST", "/v1/stop", None),
    }


def first_byte(port: int, context: ssl.SSLContext) -> bytes:
    """What a port answers to a request that comes with `context`; empty when the connection is refused or closed."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as wire,
        ):
            wire.sendall(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n")
            return wire.recv(1)
    except (ssl.SSLError, ConnectionError):
        return b""


def test_each_role_may_call_what_the_document_says() -> None:
    """403 for every `no`, success for every `yes`."""
    table = documented()
    with LocalCluster(page_service=ONE_SHARD) as cluster:
        cluster.expect_log("WARN", "ERROR")
        assert cluster.authority is not None
        writer = cluster.start_writer()
        wrong: list[str] = []
        names = {role: cluster.authority.issue(role, f"caller-{role}") for role in ROLES}
        for call, (port, method, path, body) in calls(cluster, writer).items():
            # The one that ends the agent is tried by the entitled role last.
            for role in sorted(ROLES, key=lambda role: role in table[call]):
                reply = AdminClient(port, names[role]).call(method, path, body)
                expected = 200 <= reply.status < 300 if role in table[call] else reply.status == 403
                if not expected:
                    wrong.append(f"{call} as {role}: {reply.status} {reply.text}")
        assert wrong == []


def test_who_may_not_call_learns_nothing_from_a_wrong_body() -> None:
    """The permission is checked before the body is read: once, a wrong body gave 422 to callers that may not call at all."""
    table = documented()
    with LocalCluster(members=1, page_service=ONE_SHARD) as cluster:
        cluster.expect_log("WARN")
        assert cluster.authority is not None
        writer = cluster.start_writer()
        names = {role: cluster.authority.issue(role, f"caller-{role}") for role in ROLES}
        answers: dict[str, set[int]] = {"yes": set(), "no": set()}
        with_body = {call: made for call, made in calls(cluster, writer).items() if made[3] is not None}
        consumer = (cluster.safekeepers[0].ports["admin"], "PUT", f"{cluster.log_path}/consumers/backup", None)
        for call, (port, method, path, _) in [*with_body.items(), ("delete log", consumer)]:
            for role in ROLES:
                for wrong in ("}{", "", '"text"', '{"unknown": 1}'):
                    status = AdminClient(port, names[role]).call(method, path, wrong).status
                    answers["yes" if role in table[call] else "no"].add(status)
        assert answers == {"yes": {400, 422}, "no": {403}}


def test_the_table_covers_every_http_call() -> None:
    """A call that is added to the table is added to the test above, too."""
    on_other_ports = {"propose", "peer", "read WAL", "feed", "replicate", "read pages", "put advisory"}
    with LocalCluster(members=1, page_service=ONE_SHARD) as cluster:
        writer = cluster.new_writer()
        assert set(documented()) - on_other_ports == set(calls(cluster, writer))


@pytest.mark.parametrize("port", ["append", "admin"])
def test_another_clusters_authority_is_refused_in_the_handshake(port: str, tmp_path: Path) -> None:
    """A certificate that our authority did not sign gets nothing, not even an answer."""
    with LocalCluster(members=1) as cluster:
        cluster.expect_log("WARN")
        stranger = Authority(tmp_path / "other", str(uuid.uuid4())).issue("operator", "operator")
        assert cluster.operator is not None
        mixed = ssl.create_default_context(cafile=str(cluster.operator.ca))
        mixed.load_cert_chain(stranger.certificate, stranger.key)
        assert first_byte(cluster.safekeepers[0].ports[port], mixed) == b""


def test_a_certificate_without_which_the_admin_port_does_not_answer() -> None:
    """No certificate at all: no call."""
    with LocalCluster(members=1) as cluster:
        cluster.expect_log("WARN")
        assert cluster.operator is not None
        anonymous = ssl.create_default_context(cafile=str(cluster.operator.ca))
        assert first_byte(cluster.safekeepers[0].ports["admin"], anonymous) == b""


def test_another_clusters_name_signed_by_our_authority_is_refused() -> None:
    """The cluster in the certificate counts, not only who signed it: authorities are sometimes shared."""
    with LocalCluster(members=1) as cluster:
        cluster.expect_log("WARN")
        assert cluster.authority is not None
        stranger = cluster.authority.issue_with_subject(f"/O={uuid.uuid4()}/OU=operator/CN=stranger", "stranger")

        client = AdminClient(cluster.safekeepers[0].ports["admin"], stranger)
        fence: Json = {"term": 1, "writer": str(uuid.uuid4())}
        assert client.call("POST", f"{cluster.log_path}/fence", fence).status == 403
        assert client.call("GET", "/v1/status").status == 403


def test_renewed_certificates_are_read_without_a_restart() -> None:
    """Files that change are used by new connections within seconds."""
    with LocalCluster() as cluster:
        cluster.expect_log("TLS handshake: peer sent no certificates")
        writer = cluster.start_writer()
        assert cluster.authority is not None
        served = {safekeeper.name: certificate_of(safekeeper.ports["admin"]) for safekeeper in cluster.safekeepers}
        for safekeeper in cluster.safekeepers:
            cluster.authority.issue("safekeeper", safekeeper.name)
        for safekeeper in cluster.safekeepers:
            wait_for(
                "the new certificate",
                lambda safekeeper=safekeeper: certificate_of(safekeeper.ports["admin"]) != served[safekeeper.name],
                10,
            )
        with writer.connect() as connection:
            connection.execute("create table still_commits ()")


def certificate_of(port: int) -> str:
    """The certificate that a port shows."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=5)
