"""Ports for servers that are started later."""

import random
import socket

# Linux gives outgoing connections those from 32768 on, Ray its workers those up to 19999.
_PORTS = range(20_000, 32_768)


def free_port() -> int:
    """A TCP port on which nothing listens. Not one that the system picks (port 0): its server starts seconds
    later, and until then the system may give the same port to any connection of another test, even to one
    that waits for this very server."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
