"""Certificates of a test cluster: made by `lakebase ca`, used by harness clients and PostgreSQL clients."""

import os
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lakebase_testing.environment import environment, is_root, postgres_owner


@dataclass(frozen=True)
class Credentials:
    """Three PEM files of one member."""

    name: str
    ca: Path
    certificate: Path
    key: Path

    def client_context(self) -> ssl.SSLContext:
        """Returns a context that shows this certificate and trusts this authority only."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.ca))
        context.load_cert_chain(self.certificate, self.key)
        return context

    def libpq(self) -> dict[str, str]:
        """Returns the connection parameters with which a PostgreSQL client uses it."""
        return {
            "sslmode": "verify-full",
            "sslrootcert": str(self.ca),
            "sslcert": str(self.certificate),
            "sslkey": str(self.key),
        }


class Authority:
    """A development certificate authority of one cluster."""

    def __init__(self, directory: Path, cluster: str) -> None:
        self.directory = directory
        self._run("init", str(directory), "--cluster", cluster)

    def issue(self, role: str, name: str) -> Credentials:
        """Makes a certificate for a member on this machine."""
        self._run(
            "issue", str(self.directory), "--role", role, "--name", name, "--host", "127.0.0.1", "--host", "localhost"
        )
        return Credentials(
            name, self.directory / "ca.pem", self.directory / f"{name}.pem", self.directory / f"{name}.key"
        )

    def issue_for_postgres(self, role: str, name: str) -> Credentials:
        """The same, with the key readable by PostgreSQL's user only, as libpq demands."""
        made = self.issue(role, name)
        if is_root():
            owner = postgres_owner()
            os.chown(made.key, owner.pw_uid, owner.pw_gid)
        made.key.chmod(0o600)
        return made

    def issue_with_subject(self, subject: str, name: str) -> Credentials:
        """Signs a certificate with any subject (`/O=.../CN=...`), which the engine's own command never would."""
        made = Credentials(name, *(self.directory / file for file in ("ca.pem", f"{name}.pem", f"{name}.key")))
        request, extensions = (self.directory / f"{name}.{kind}" for kind in ("csr", "ext"))
        extensions.write_text("basicConstraints = CA:FALSE\nextendedKeyUsage = serverAuth, clientAuth\n")
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        signer = ["-CA", str(self.directory / "ca.pem"), "-CAkey", str(self.directory / "ca.key"), "-CAcreateserial"]
        output = ["-out", str(made.certificate), "-days", "2", "-extfile", str(extensions)]
        for line in (
            ["req", "-new", *curve, "-keyout", str(made.key), "-out", str(request), "-subj", subject],
            ["x509", "-req", "-in", str(request), *signer, *output],
        ):
            subprocess.run(["openssl", *line], check=True, capture_output=True)
        return made

    @staticmethod
    def _run(*arguments: str) -> None:
        subprocess.run([str(environment().lakebase), "ca", *arguments], check=True, capture_output=True, text=True)
