"""Clients that leave `vico serve`, at any point of a request and in any way, free their places at once."""

import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.served import Served, get, image_part, picture, user
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S, wait_until

CHAT = "/v1/chat/completions"
LONG = 1500
"""Tokens of an answer that is still running when the others of a test have left."""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    """Return a server that answers two requests at once and keeps the others waiting."""
    model = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    options = ("--max-batch", "2", "--max-requests", "8", "--max-requests-per-client", "8")
    server = Served(model, *options, "--max-new-tokens", str(LONG), "--idle-timeout", "60").started()
    yield server
    assert server.end() == (0, ""), "no client may fill the log"


def connected(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def request(server: Served, num_words: int = 1, **fields: object) -> bytes:
    """Return a whole request: head and body."""
    messages = [user(image_part(picture(1)), "what " * num_words)]
    content = {"model": server.name, "messages": messages, "max_tokens": LONG, "seed": 1, **fields}
    body = json.dumps(content).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def num_requests(server: Served) -> int:
    return int(get(f"{server.url.removesuffix('/v1')}/health")[1]["requests"])


def figures(server: Served) -> dict[str, float]:
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }


def leave(connection: socket.socket, way: str) -> None:
    """Close a connection with FIN, or reset it."""
    if way == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_empty(server: Served) -> bool:
    """Whether the server holds nothing for any request, in HTTP and in the engine."""
    values = figures(server)
    names = ("open_requests", "held_bytes", "waiting_requests", "running_requests", "cache_tokens")
    return all(values[f"vico_{name}"] == 0 for name in names)


WAYS = pytest.mark.parametrize("way", ["close", "reset"])


@WAYS
def test_streams_that_are_closed_at_any_time_free_their_places(server, way):
    """An answer is cut at any of its pieces: while one is computed, is sent, or was just sent."""
    moments = random.Random(way)
    for _ in range(25):
        connections = [connected(server) for _ in range(4)]
        for connection in connections:
            connection.sendall(request(server, stream=True))
        for connection in connections[:2]:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(moments.random() * 0.02)
        for connection in connections:
            leave(connection, way)
        wait_until(lambda: num_requests(server) == 0)
    wait_until(lambda: is_empty(server))


@WAYS
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("delay_s", [0, 0.02, 0.3], ids=["at once", "in the prefill", "in the answer"])
def test_a_running_request_ends_when_its_client_leaves(server, way, stream, delay_s):
    connections = [connected(server) for _ in range(2)]
    for connection in connections:
        connection.sendall(request(server, 500, stream=stream))
    time.sleep(delay_s)
    for connection in connections:
        leave(connection, way)
    wait_until(lambda: is_empty(server))


@WAYS
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ahead", [b"", b"G", b"GET /health HTTP/1.1\r\n" * 100], ids=["", "byte", "lines"])
def test_a_waiting_client_that_leaves_frees_its_place_before_its_turn(server, way, stream, ahead):
    """Also one that has sent the start of a next request, after which uvicorn stops reading."""
    running = [connected(server) for _ in range(2)]
    for connection in running:
        connection.sendall(request(server, stream=True))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    waiting = [connected(server) for _ in range(4)]
    for connection in waiting:
        connection.sendall(request(server, stream=stream))
    wait_until(lambda: num_requests(server) == 6)
    for connection in waiting:
        connection.sendall(ahead)
    time.sleep(0.05)  # so that what was sent ahead arrives by itself
    for connection in waiting:
        leave(connection, way)
    wait_until(lambda: num_requests(server) == 2)
    assert figures(server)["vico_running_requests"] == 2, "the answers before them are still running"
    for connection in running:
        leave(connection, way)
    wait_until(lambda: is_empty(server))


@WAYS
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_client_that_leaves_within_its_body_frees_its_memory(server, way, share):
    content = request(server)
    connections = [connected(server) for _ in range(4)]
    for connection in connections:
        connection.sendall(content[: int(len(content) * share)])
    time.sleep(0.05)
    for connection in connections:
        leave(connection, way)
    wait_until(lambda: is_empty(server))
    assert server.ask([user("what")], max_tokens=1).usage.completion_tokens == 1


@WAYS
def test_a_client_that_leaves_with_its_whole_body_unparsed_frees_its_place(server, way):
    """Eight bodies of many values are parsed by two threads."""
    body = b"[" + b"{}," * 30_000 + b"{}]"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connections = [connected(server) for _ in range(8)]
    for connection in connections:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        leave(connection, way)
    wait_until(lambda: is_empty(server))


def test_a_client_that_sends_without_end_ahead_of_its_answer_is_cut_off(server):
    connection = connected(server)
    connection.sendall(request(server))
    wait_until(lambda: num_requests(server) == 1)
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            connection.sendall(b"x" * 65536)
    connection.close()
    wait_until(lambda: is_empty(server))
