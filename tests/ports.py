"""Ports for servers that are started later."""

import random
import socket

# Linux gives ports from 32768 on to outgoing connections, Ray gives those up to 19999 to its workers.
_PORTS = range(20_000, 32_768)


def free_port() -> int:
    """Return a TCP port on which nothing listens.

    A port picked by the system (port 0) would not do: the server starts seconds later, and until then the
    system may give the port to a connection of another test, even to one that waits for this server.
    """
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
