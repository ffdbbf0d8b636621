"""Where binaries, PostgreSQL and its suites are: what `build/env.sh` says."""

import os
import pwd
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """Paths of one build, and who PostgreSQL runs as."""

    bin: Path
    vfs: Path
    postgres_bin: Path
    postgres_tests: Path
    postgres_user: str

    @property
    def lakebase(self) -> Path:
        """The engine's binary."""
        return self.bin / "lakebase"


@cache
def environment() -> Environment:
    """Returns the environment of this run.

    Raises: RuntimeError when build/env.sh was not sourced.
    """
    try:
        found = Environment(
            bin=Path(os.environ["LAKEBASE_BIN"]),
            vfs=Path(os.environ["LAKEBASE_VFS"]),
            postgres_bin=Path(os.environ["LAKEBASE_TEST_PG"]),
            postgres_tests=Path(os.environ["LAKEBASE_PG_TESTS"]),
            postgres_user=os.environ["LAKEBASE_PG_USER"],
        )
    except KeyError as missing:
        raise RuntimeError(f"{missing} is not set: source build/env.sh (written by `make build`)") from None
    for path in (found.lakebase, found.vfs):
        if not path.exists():
            raise RuntimeError(f"{path} does not exist: run `make build`")
    return found


def is_root() -> bool:
    """Whether faults that need privileges, and running as another user, are possible."""
    return os.geteuid() == 0


def postgres_owner() -> pwd.struct_passwd:
    """Returns the user that PostgreSQL runs as: somebody unprivileged where we are root, else ourselves."""
    return pwd.getpwnam(environment().postgres_user) if is_root() else pwd.getpwuid(os.geteuid())


def scratch(prefix: str) -> Path:
    """Makes a new directory that PostgreSQL's user may enter."""
    path = Path(tempfile.mkdtemp(prefix=f"lakebase-{prefix}-"))
    path.chmod(0o755)
    return path


def give_to_postgres(path: Path) -> Path:
    """Makes PostgreSQL's user the owner of `path`; returns it."""
    if is_root():
        owner = postgres_owner()
        os.chown(path, owner.pw_uid, owner.pw_gid)
    return path
