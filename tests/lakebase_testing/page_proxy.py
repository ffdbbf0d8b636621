"""A proxy between a compute and a page server that changes which version of a page is asked for. Without TLS only.

The page server answers what it is asked; so the proxy makes it behave as one that lags as far as the request allows, or as
a reader that asks for less than it must.
"""

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

# docs/formats/page-protocol.md: the header, and the body of GetPages.
_HEADER = struct.Struct("<IB3xI")
_GET_PAGES = 0x41
_BODY = struct.Struct("<QIIIBIHQQ")
NEWEST = (1 << 64) - 1


@dataclass(frozen=True)
class GetPages:
    """What a request for pages says."""

    id: int
    tablespace: int
    database: int
    relation: int
    fork: int
    first_block: int
    count: int
    request_lsn: int
    not_modified_since: int

    def pack(self) -> bytes:
        """The body of the message."""
        return _BODY.pack(
            self.id, self.tablespace, self.database, self.relation, self.fork, self.first_block, self.count,
            self.request_lsn, self.not_modified_since,
        )  # fmt: skip


class PageProxy:
    """Listens on a port of its own; `change` sees each request for pages and returns what is asked instead."""

    def __init__(self, target_port: int, change: Callable[[GetPages], GetPages]) -> None:
        self._target_port = target_port
        self._change = change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._lock = threading.Lock()
        self._ended = False
        # Requests that were changed.
        self.changed = 0

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            sockets, threads = list(self._sockets), list(self._threads)
        for each in sockets:
            _shut(each)
        for thread in threads:
            thread.join(10)
        for each in sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                reader, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                return  # The end of the proxy, or of the page server before it.
            for each in (reader, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            requests = threading.Thread(target=self._pass_requests, args=(reader, server), daemon=True)
            answers = threading.Thread(target=_pass_bytes, args=(server, reader), daemon=True)
            with self._lock:
                if self._ended:
                    reader.close()
                    server.close()
                    return
                self._sockets += [reader, server]
                self._threads += [requests, answers]
            requests.start()
            answers.start()

    def _pass_requests(self, reader: socket.socket, server: socket.socket) -> None:
        try:
            with reader.makefile("rb") as stream:
                while header := stream.read(_HEADER.size):
                    length, kind, _ = _HEADER.unpack(header)
                    body = stream.read(length)
                    if kind == _GET_PAGES:
                        asked = GetPages(*_BODY.unpack(body))
                        instead = self._change(asked)
                        self.changed += instead != asked
                        body = instead.pack()
                    server.sendall(header + body)
        except OSError:
            pass  # Either side went away: the other one is told so.
        finally:
            _shut(server)
            _shut(reader)


def _pass_bytes(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass  # As above.
    finally:
        _shut(source)
        _shut(target)


def _shut(which: socket.socket) -> None:
    try:
        which.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # It was closed already.
