"""HTTP client of the admin ports."""

import http.client
import json
import re
import urllib.request
from dataclasses import dataclass
from typing import cast

from lakebase_testing.certificates import Credentials

Json = dict[str, object]


@dataclass(frozen=True)
class Reply:
    """What an admin port answered."""

    status: int
    text: str

    @property
    def body(self) -> Json:
        """The JSON object of the answer."""
        return cast("Json", json.loads(self.text))

    @property
    def error(self) -> str:
        """The code of an error answer."""
        return str(self.body["error"])


class AdminClient:
    """One admin port, called with one certificate (or none)."""

    def __init__(self, port: int, credentials: Credentials | None, timeout_seconds: float = 10) -> None:
        self.port = port
        self._credentials = credentials
        self._timeout_seconds = timeout_seconds

    @property
    def url(self) -> str:
        """The address as the command line wants it."""
        return f"{'https' if self._credentials else 'http'}://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: Json | str | None = None) -> Reply:
        """Makes one call on a connection of its own.

        Raises: OSError when the port is closed or the handshake fails.
        """
        if self._credentials is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self._timeout_seconds)
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=self._timeout_seconds, context=self._credentials.client_context()
            )
        try:
            text = body if isinstance(body, str) or body is None else json.dumps(body)
            connection.request(method, path, text, {"content-type": "application/json"} if text is not None else {})
            response = connection.getresponse()
            return Reply(response.status, response.read().decode())
        except http.client.HTTPException as error:
            raise ConnectionError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()

    def get(self, path: str) -> Json:
        """Returns the JSON of a successful GET.

        Raises: AssertionError with the answer where it is an error.
        """
        reply = self.call("GET", path)
        assert reply.status == 200, f"GET {path}: {reply.status} {reply.text}"
        return reply.body

    def try_get(self, path: str) -> Json | None:
        """Returns the JSON of a GET, or None where nobody answers (yet)."""
        try:
            return self.get(path)
        except OSError:
            return None


def figure(metrics_port: int, name: str) -> float:
    """Returns the sum of a metric over its labels; `name` without the program's prefix.

    Raises: AssertionError when there is no such metric.
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.findall(rf"^lakebase_(?:\w+_)?{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {name} in:\n{text}"
    return sum(map(float, found))
