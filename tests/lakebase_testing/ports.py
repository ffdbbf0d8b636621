"""Free ports on loopback."""

import random
import socket

# Below the range from which the kernel picks ports of outgoing connections, so that none of those can take ours
# between this choice and the start of the server (or while a server is down on purpose).
_RANGE = range(15_000, 32_000)
_given: set[int] = set()


def free_port() -> int:
    """Returns a port that nobody listens on and that this run has not given away before."""
    source = random.SystemRandom()
    for _ in range(1_000):
        port = source.choice(_RANGE)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise RuntimeError("no free port on loopback")
