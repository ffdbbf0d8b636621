"""Page servers of a cluster, and the object storage beneath them.

A page server may be killed and started again at will; each start is another generation of its shard, as the operator
would grant it. `lose_disk` removes what it holds locally: all that is durable is in object storage and on the safekeepers.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lakebase_operator import naming
from lakebase_testing.admin import AdminClient, Json, figure
from lakebase_testing.environment import environment
from lakebase_testing.ports import free_port
from lakebase_testing.process import Process
from lakebase_testing.s3 import own_s3, s3_url
from lakebase_testing.waiting import wait_for

if TYPE_CHECKING:
    from lakebase_testing.cluster import LocalCluster

ObjectStorage = Literal["file", "s3"]
# Places of the hash space that shards divide among them.
_HASHES = 1 << 32


@dataclass(frozen=True)
class PageServiceSettings:
    """How the pages of a cluster are kept and read; the defaults are small, so that tests meet every limit."""

    shards: int = 4
    object_storage: ObjectStorage = "file"
    stripe_blocks: int = 2048
    # Of the writer's cache of relation blocks.
    cache_bytes: int = 0
    evict: Literal["as_needed", "always"] = "as_needed"
    fill_timeout: str = "60s"
    # Above this the writer is slowed.
    ingest_lag_bytes: int = 256 << 20
    # Safekeepers keep WAL in object storage that page servers do not need any more.
    archive: bool = False
    # Of each page server.
    freeze_bytes: str = "8MiB"
    freeze_interval: str = "5s"
    # Each batch of WAL is held back by a random time up to this.
    ingest_delay_ms: int = 0


def storage_url(kind: ObjectStorage, directory: Path) -> str:
    """Returns where a cluster keeps its objects.

    Raises: AssertionError for `s3` where no server can be had; a test asks `s3_url` before.
    """
    if kind == "file":
        return f"file://{directory / 'objects'}"
    url = s3_url()
    assert url is not None, "no S3 server: set LAKEBASE_TEST_S3_URL and AWS_*, or install Go (scripts/s3-server)"
    return f"{url.rstrip('/')}/{directory.name}"


def object_directory(kind: ObjectStorage, directory: Path) -> Path:
    """Returns where the objects of a cluster are as files: the S3 server of this run keeps them so, too.

    Raises: AssertionError where the S3 server is not this run's.
    """
    if kind == "file":
        return directory / "objects"
    server = own_s3()
    assert server is not None, "the S3 server is not this run's"
    return server / "objects" / "lakebase" / directory.name


class PageServer:
    """One page server process and its data."""

    def __init__(self, cluster: "LocalCluster", name: str, shard: int, settings: PageServiceSettings) -> None:
        self.shard = shard
        self.name = naming.page_server(name, shard)
        self.generation = 0
        self.begin = (shard * _HASHES) // settings.shards
        self.end = ((shard + 1) * _HASHES) // settings.shards
        self.directory = cluster.directory / self.name
        self.directory.mkdir()
        self.data = self.directory / "data"
        # The same as this process reaches it: another path where a disk is mounted for the page server alone.
        self.files = self.data
        self.ports = {key: free_port() for key in ("pages", "admin", "metrics")}
        # Where computes look for it: a proxy in some tests.
        self.reached_at = self.ports["pages"]
        self.config = self.directory / "pageserver.toml"
        self.admin = AdminClient(self.ports["admin"], cluster.operator)
        self._cluster = cluster
        self._settings = settings
        self._tls = cluster.tls("pageserver", self.name)
        self.process = Process(
            name=self.name,
            command=[str(environment().lakebase), "pageserver", "--config", str(self.config)],
            log=self.directory / "log",
            user=cluster.user,
            wrapper=cluster.wrapper,
        )

    def configuration(self) -> str:
        """The text of pageserver.toml."""
        listen = "\n".join(f'{key} = "127.0.0.1:{port}"' for key, port in self.ports.items())
        safekeepers = "\n".join(
            f'[[safekeepers]]\nappend = "127.0.0.1:{sk.ports["append"]}"\n' for sk in self._cluster.safekeepers
        )
        return f"""
cluster = "{self._cluster.id}"
branch = "{self._cluster.branch}"
shard = {self.shard}
generation = {self.generation}
begin = {self.begin}
end = {self.end}
data_dir = "{self.data}"
object_storage = "{self._cluster.object_storage}"

{safekeepers}
[listen]
{listen}

[tls]
{self._tls}

[ingest]
freeze_bytes = "{self._settings.freeze_bytes}"
freeze_interval = "{self._settings.freeze_interval}"
test_ingest_delay_ms = {self._settings.ingest_delay_ms}
"""

    def start(self) -> None:
        """Starts the process as the next generation of its shard."""
        self.generation += 1
        self.config.write_text(self.configuration())
        self._cluster.adopt(self.directory)
        self.process.start()

    def wait_ready(self) -> None:
        """Waits until the admin port answers."""

        def answers() -> Json | None:
            assert self.process.is_running, f"{self.name} ended:\n{self.process.log_text()[-4000:]}"
            return self.admin.try_get("/v1/status")

        wait_for(f"{self.name} to answer", answers, 60)

    def kill(self) -> None:
        """Kills the process (SIGKILL)."""
        self.process.kill()

    def lose_disk(self) -> None:
        """Removes everything that the (ended) process holds locally."""
        assert not self.process.is_running
        if self.files.exists():
            for path in self.files.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def status(self) -> Json:
        """What the page server says about itself."""
        return self.admin.get("/v1/status")

    def freeze(self) -> None:
        """Makes all that it has ingested durable in object storage."""
        reply = self.admin.call("POST", "/v1/freeze")
        assert reply.status == 200, f"{self.name}: freeze: {reply.status} {reply.text}"

    def figure(self, name: str) -> int:
        """One of its metrics."""
        return int(figure(self.ports["metrics"], name))

    def objects(self, kind: Literal["layers", "manifests", "claims"]) -> Path:
        """Where objects of its shard are as files."""
        return self._cluster.objects / "shards" / f"{self.shard:08x}" / kind

    def shard_table(self) -> str:
        """This shard in compute.toml; generation 0: the writer talks to whoever owns the shard."""
        return (
            f"[[page_service.shards]]\nshard = {self.shard}\ngeneration = 0\nbegin = {self.begin}\nend = {self.end}\n"
            f'pages = "127.0.0.1:{self.reached_at}"\n'
        )


def compute_section(settings: PageServiceSettings, page_servers: list[PageServer]) -> str:
    """`[page_service]` and `[backpressure]` of compute.toml."""
    shards = "\n".join(server.shard_table() for server in page_servers)
    return f"""
[page_service]
stripe_blocks = {settings.stripe_blocks}
cache_bytes = {settings.cache_bytes}
evict = "{settings.evict}"
fill_timeout = "{settings.fill_timeout}"
{shards}
[backpressure]
ingest_lag_bytes = {settings.ingest_lag_bytes}
"""
