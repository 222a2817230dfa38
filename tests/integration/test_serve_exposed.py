"""`vico serve` and clients that mean it no good: keys, hosts, slow and greedy clients, broken requests."""

import base64
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from pipeline.serving.http.access import Access, api_keys
from pipeline.serving.server import serve
from pipeline.serving.start.settings import ServerSettings
from tests.integration.test_serve import LIMITS, SMALL
from tests.served import Served, encoded, get, image_part, picture, schemathesis_command, user
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S, wait_until
from vico.errors import UserError

OTHER_CLIENT = "127.0.0.2"
KEYS = ("first-key", "second-key")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS) + "\n")
    options = ["--api-key-file", str(keys), "--allowed-host", "Vico.example", "--max-body-mb", "4"]
    options += ["--max-requests", "8", "--max-requests-per-client", "5", "--max-megapixels", "1"]
    options += ["--max-held-mb", "8", "--max-new-tokens", "20"]
    options += ["--header-timeout", "1", "--body-timeout", "3", "--idle-timeout", "1"]
    server = Served(SMALL, *options).started()
    server.client = server.client.with_options(api_key=KEYS[1])
    yield server
    assert server.end() == (0, ""), "no client may fill the log"


def address(server: Served) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    return host, int(port)


def asked(
    server: Served, content: bytes, path: str = CHAT, source: str = "127.0.0.1", **headers: str
) -> tuple[int, dict[str, Any]]:
    """Send a body as it is, and return the status and the body of the response."""
    connection = http.client.HTTPConnection(*address(server), timeout=PATIENCE_S, source_address=(source, 0))
    with closing(connection):
        given = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST" if content else "GET", path, content or None, given)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def refused(server: Served, content: bytes, **options: Any) -> tuple[int, str]:
    """Return status and message of an error, which must have OpenAI's form."""
    status, body = asked(server, content, **options)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert len(body["error"]["message"]) < 600
    return status, body["error"]["message"]


def body_of(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"model": SMALL.name, "messages": messages, "max_tokens": 1, **fields}).encode()


def is_well(server: Served, source: str = "127.0.0.1") -> None:
    assert asked(server, body_of(user("hello")), source=source)[0] == 200


def test_a_key_is_required_but_for_health(server):
    root = server.url.removesuffix("/v1")
    assert get(f"{root}/health")[0] == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        assert get(root + path)[0] == 401
    for key in KEYS:
        assert asked(server, b"", "/v1/models", Authorization=f"bearer {key}")[0] == 200
    for given in (
        "Bearer wrong",
        "Bearer first-key2",
        "Bearer",
        "first-key",
        "Basic first-key",
        "Bearer \xff",
    ):
        status, message = refused(server, body_of(user("x")), Authorization=given)
        assert status == 401 and "Authorization: Bearer KEY" in message


def test_a_name_that_is_not_allowed_is_refused(server):
    for host in ("vico.example", "VICO.EXAMPLE:8000", "localhost", "127.0.0.1:1", "[::1]:80", "192.168.1.5"):
        assert asked(server, b"", "/v1/models", Host=host)[0] == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "vico.example.evil"):
        status, message = refused(server, b"", path="/health", Host=host)
        assert status == 421 and "--allowed-host" in message


def test_a_client_without_a_key_cannot_pass_for_several():
    assert Access().client("10.0.0.1", "Bearer a") == Access().client("10.0.0.1", "Bearer b")
    keyed = Access((b"a", b"b"))
    assert keyed.client("10.0.0.1", "Bearer a") != keyed.client("10.0.0.1", "Bearer b")


@pytest.mark.parametrize("text", ["", "a b\n", "\xe9\n"])
def test_a_key_file_without_a_proper_key_is_an_error(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match="key"):
        api_keys(None, tmp_path / "keys")
    with pytest.raises(UserError, match=r"--api-key-file=.*nothing"):
        api_keys(None, tmp_path / "nothing")


SURROGATE = b"\\ud800"


@pytest.mark.parametrize(
    "content",
    [
        body_of(user("X")).replace(b'"X"', b'"a' + SURROGATE + b'"'),
        body_of({"role": "user", "content": "X"}).replace(b"X", SURROGATE + b"x"),
        body_of(user("x")).replace(SMALL.name.encode(), SURROGATE),
        body_of(user("x"), user="X").replace(b"X", b"\\udfff"),
        body_of(user("x"), X=1).replace(b"X", SURROGATE),
        body_of(user({"type": "image_url", "image_url": {"url": "X"}})).replace(b"X", SURROGATE),
        body_of(user("x"), stop=["X"]).replace(b"X", b"\xed\xa0\x80"),
        body_of(user("X")).replace(b"X", b"\xff"),
        body_of(user("x")).decode().encode("utf-16"),
        body_of(user("x"), temperature=float("nan")),
        body_of(user("x")).replace(b": 1}", b": " + b"1" * 5000 + b"}"),
        b"[" * 100_000,
        b'{"a":' * 10_000,
        body_of(
            user(
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,\u00e9\u00e9\u00e9\u00e9"}}
            )
        ),
        body_of(user({"type": "image_url", "image_url": {"url": "data:image/\u20ac;base64,AAAA"}})),
        body_of(user({"type": "image_url", "image_url": {"url": "data:;base64,"}})),
        body_of(user("x"), seed=2**70),
        body_of(user("x"), temperature="hot"),
        b"\x00" * 100,
        b"null",
    ],
    ids=lambda value: "",
)
def test_a_broken_body_is_a_400(server, content):
    assert refused(server, content)[0] == 400
    is_well(server)


def test_names_and_values_are_not_repeated_whole(server):
    assert refused(server, body_of(user("x"), **{"k" * 100_000: 1}))[0] == 400
    assert refused(server, body_of(user("x")).replace(SMALL.name.encode(), b"m" * 100_000))[0] == 404
    assert refused(server, body_of(user("x"), temperature="9" * 100_000))[0] == 400
    assert refused(server, b"", path="/" + "x" * 10_000)[0] == 404


def test_the_reason_is_the_right_one(server):
    status, message = refused(server, body_of(user(*["x"] * 1001)))
    assert status == 400 and "at most 1000 items" in message
    assert refused(server, body_of({"role": "user", "content": 3}))[1].startswith("messages.0.content=3")


def test_a_media_type_has_any_case_and_parameters(server):
    content = body_of(user("hello"))
    for name in ("Application/JSON", "APPLICATION/json ; Charset=UTF-8"):
        assert asked(server, content, Content_Type=name)[0] == 200
    assert refused(server, content, Content_Type="text/plain")[0] == 415


@pytest.mark.parametrize("text", [" " * 3_000_000, "a" * 3_000_000, "\u00e9" * 500_000, "a b" * 100_000])
def test_a_text_that_is_far_too_long_is_not_tokenised(server, text):
    status, message = refused(server, body_of(user("x", text)))
    assert status == 400 and "bytes that this server reads" in message


def test_a_body_of_many_values_is_not_parsed(server):
    status, message = refused(server, b"[" + b"{}," * 500_000 + b"{}]")
    assert status == 413 and "JSON values" in message


@contextmanager
def half_sent(server: Served, head: bytes, number: int, source: str) -> Iterator[list[socket.socket]]:
    sockets = [socket.create_connection(address(server), 30, (source, 0)) for _ in range(number)]
    try:
        for connection in sockets:
            connection.sendall(head)
        yield sockets
    finally:
        for connection in sockets:
            connection.close()


def answer_to(connection: socket.socket) -> bytes:
    """Return all that the server sends until it ends the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def post_head(length: int) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    return (head + f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n").encode()


def test_half_sent_bodies_take_places_of_their_client_only_and_are_cut_off(server):
    with half_sent(server, post_head(1000) + b"{", 5, OTHER_CLIENT) as sockets:
        wait_until(lambda: asked(server, body_of(user("x")), source=OTHER_CLIENT)[0] == 429)
        is_well(server)
        for connection in sockets:
            received = answer_to(connection)
            assert received.startswith(b"HTTP/1.1 408") and b"request_timeout" in received
    is_well(server, OTHER_CLIENT)


def test_a_body_that_trickles_in_is_cut_off(server):
    with half_sent(server, post_head(1000), 1, OTHER_CLIENT) as [connection]:
        pause_s, received = 0.2, b""
        connection.settimeout(pause_s)
        for _ in range(int(PATIENCE_S / pause_s)):
            try:
                connection.sendall(b" ")
                piece = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            received += piece
            if not piece:
                break
        assert received.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("head", [b"", b"POST /v1/chat/comp", b"GET /health HTTP/1.1\r\nX-A: b\r\n"])
def test_a_half_sent_head_is_cut_off(server, head):
    with half_sent(server, head, 3, OTHER_CLIENT) as sockets:
        for connection in sockets:
            assert b"HTTP/1.1 408" in answer_to(connection)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with half_sent(server, whole, 1, OTHER_CLIENT) as [connection]:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(head or b"GET")  # the head of a second request
        assert b"HTTP/1.1 408" in answer_to(connection)


def test_a_declared_length_above_the_limit_is_not_waited_for(server):
    with half_sent(server, post_head(5 * 2**20), 1, "127.0.0.1") as [connection]:
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    with half_sent(server, post_head(10**40), 1, "127.0.0.1") as [connection]:
        assert connection.recv(65536).startswith(b"HTTP/1.1 4")
    assert refused(server, b"x" * (5 * 2**20))[0] == 413, "read by a client that sends before it reads"


def test_what_is_not_http_is_refused_in_the_usual_form(server):
    for sent in (
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"G" * 70_000,
    ):
        with half_sent(server, sent, 1, "127.0.0.1") as [connection]:
            received = connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 4") and b'"error"' in received, sent[:40]


def test_bodies_have_a_common_limit_of_memory(server):
    with half_sent(server, post_head(4 * 2**20), 4, OTHER_CLIENT) as sockets:
        stop = time.monotonic() + 0.8  # the server cuts them off later
        answers = b""
        for connection in sockets:
            connection.setblocking(False)
        while time.monotonic() < stop and b"requests hold" not in answers:
            for connection in sockets:
                try:
                    connection.send(b" " * 65536)
                except OSError:
                    try:
                        answers += connection.recv(65536)
                    except OSError:
                        continue
        assert b"HTTP/1.1 429" in answers and b"requests hold" in answers
    wait_until(lambda: figures(server)["vico_held_bytes"] == 0)  # once their sent bytes are read


def broken_pictures() -> Iterator[bytes]:
    """Yield pictures of three formats, cut, with bytes changed, inserted or repeated."""
    changes = random.Random(7)
    for name in ("PNG", "JPEG", "WEBP"):
        whole = encoded(picture(3, (70, 50)), name)
        for _ in range(60):
            content = bytearray(whole)
            kind = changes.randrange(4)
            place = changes.randrange(len(content))
            if kind == 0:
                del content[place:]
            elif kind == 1:
                for _ in range(changes.randrange(1, 30)):
                    content[changes.randrange(len(content))] = changes.randrange(256)
            elif kind == 2:
                content[place:place] = changes.randbytes(changes.randrange(1, 2000))
            else:
                content[place : place + 100] = content[:100]
            yield bytes(content)
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    yield bytes(bomb)
    yield b""


def test_broken_pictures_are_never_a_fault_of_the_server(server):
    statuses = []
    for content in broken_pictures():
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        part = {"type": "image_url", "image_url": {"url": url}}
        statuses.append(asked(server, body_of(user(part, "what")))[0])
    assert set(statuses) == {200, 400}, "some changes leave a picture that decodes"
    is_well(server)


def figures(server: Served) -> dict[str, float]:
    connection = http.client.HTTPConnection(*address(server), timeout=PATIENCE_S)
    with closing(connection):
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"})
        text = connection.getresponse().read().decode()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }


def test_a_client_that_leaves_is_no_fault_of_the_server(server):
    """While its body is read, while it waits for its answer, and in the middle of a stream."""
    left, open_requests = 'vico_responses_total{status="499"}', "vico_open_requests"
    wait_until(lambda: figures(server)[open_requests] == 0)  # of earlier tests: five of a client are the most
    before = figures(server).get(left, 0)
    body = body_of(user("what"), max_tokens=20)
    with half_sent(server, post_head(len(body)) + body[:10], 3, OTHER_CLIENT):
        pass
    wait_until(lambda: figures(server).get(left, 0) >= before + 3)
    with half_sent(server, post_head(len(body)) + body, 3, OTHER_CLIENT):
        pass
    stream = server.ask([user("what")], max_tokens=20, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: figures(server)[open_requests] == 0)
    assert 'vico_responses_total{status="500"}' not in figures(server)


def test_metrics_count_what_was_asked(server):
    before = figures(server)
    answer = server.ask([user(image_part(picture(1)), "what")], max_tokens=3)
    after = figures(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    image = answer.usage.prompt_tokens_details.image_tokens
    assert grown('vico_tokens_total{kind="image"}') == image
    assert grown('vico_tokens_total{kind="text"}') == answer.usage.prompt_tokens - image
    assert grown('vico_tokens_total{kind="generated"}') == answer.usage.completion_tokens
    assert grown('vico_responses_total{status="200"}') >= 1
    for held in ("vico_open_requests", "vico_held_bytes", "vico_cache_tokens"):
        wait_until(lambda name=held: figures(server)[name] == 0)  # freed after the answer is sent
    assert grown("vico_first_token_seconds_count") == 1


def test_the_document_describes_every_path(server):
    status, document = asked(server, b"", "/openapi.json")
    assert status == 200 and document["security"] == [{"key": []}]
    assert set(document["paths"]) == {"/health", "/metrics", "/v1/models", "/v1/models/{name}", CHAT}
    request = document["components"]["schemas"]["ChatRequest"]
    assert {"model", "messages", "temperature", "vico"} <= set(request["properties"])


@pytest.mark.slow
def test_schemathesis_gets_no_fault_out_of_the_server(server, tmp_path):
    """Every answer must be as the document says. `make load` sends 10,000 requests."""
    command = schemathesis_command(server, KEYS[0], int(os.environ.get("VICO_FUZZ_EXAMPLES", "100")), 1)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=2 * PATIENCE_S)
    print(done.stdout[-600:])
    assert done.returncode == 0, done.stdout[:4000]
    is_well(server)


@pytest.mark.slow
@pytest.mark.usefixtures("terminal_signals")
def test_a_signal_refuses_waiting_requests_at_once_and_lets_running_ones_end(tmp_path):
    server = Served(make_tiny_model(tmp_path / "tiny"), "--max-batch", "1", "--drain", "60").started()
    long = [user(image_part(picture(1)), "what")]
    stream = server.ask(long, max_tokens=1000, stream=True)
    next(iter(stream))
    errors: list[Exception] = []

    def wait() -> None:
        try:
            server.ask(long, max_tokens=400)
        except Exception as error:
            errors.append(error)

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    root = server.url.removesuffix("/v1")
    wait_until(lambda: get(f"{root}/health")[1]["requests"] == 4)
    server.process.send_signal(signal.SIGTERM)
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert [type(error) for error in errors] == [openai.InternalServerError] * 3
    for error in errors:
        assert error.status_code == 503 and error.body["code"] == "stopping"
        assert int(error.response.headers["Retry-After"]) > 0
    last = None
    for chunk in stream:
        last = chunk
    assert last is not None and last.choices[0].finish_reason in ("stop", "length"), "it was not cut off"
    assert server.end(0) == (0, "")


def test_limits_that_contradict_each_other_are_errors():
    from dataclasses import replace

    settings = ServerSettings("127.0.0.1", 0, "cpu", "float32")
    for limits, words in (
        (replace(LIMITS, held_bytes=1), "--max-held-mb=0 is below --max-body-mb=1"),
        (replace(LIMITS, per_client=3), "--max-requests-per-client=3 is above --max-requests=2"),
        (replace(LIMITS, cache_tokens=100), "--cache-tokens=100 is below the 4096 tokens"),
    ):
        with pytest.raises(UserError, match=words):
            serve(str(SMALL), settings, limits)


def test_the_peak_of_memory_stays_below_what_the_server_says():
    """Large pictures, long texts and places full of bodies at once. The model is small."""
    options = ["--max-body-mb", "8", "--max-held-mb", "64", "--max-megapixels", "20", "--max-requests", "32"]
    server = Served(SMALL, *options, "--picture-cache-mb", "16", "--max-requests-per-client", "32")
    server.started()
    allowed = int(server.process.stdout.readline().split("at most ")[1].split()[0]) * 2**20

    def memory(name: str) -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024

    before = memory("VmRSS")
    large = Image.effect_noise((4400, 4400), 30)
    contents = [
        body_of(
            user({"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 7_900_000}})
        ),
        body_of(user(image_part(large.resize((2400, 2400)), format="JPEG"), "what")),
        body_of(user(image_part(Image.new("RGB", (4400, 4400))), "what")),
        body_of(user("a" * 30_000)),
        body_of(user(" " * 7_000_000)),
        b"[" + b"{}," * 2_000_000 + b"{}]",
        body_of(user("x"), **{f"k{n}": n for n in range(50_000)}),
    ]
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: statuses.append(asked(server, contents[n % len(contents)])[0]))
        for n in range(42)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert set(statuses) <= {200, 400, 413, 429} and {200, 400} <= set(statuses)
    assert memory("VmHWM") - before < allowed
    assert server.end() == (0, "")
