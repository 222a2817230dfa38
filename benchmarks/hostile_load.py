"""Hostile and ordinary requests against `vico serve`, counted, with the delay and the memory that they cause.

    python -m benchmarks.hostile_load --requests 10000

It starts a server of the demo model and sends it, from several connections, broken bodies, broken
pictures, long texts, many values, large pictures, clients that leave, and questions. Meanwhile a probe of
another address asks for `/health` and for short answers. The last line is JSON: responses by status, the
longest waits of the probe, and the peak of the server's memory beside what it announced. It ends with code 1
if a status is 5xx, or the peak is above.
"""

import argparse
import base64
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from tests.served import Served, encoded, image_part, picture, user

SMALL = Path(__file__).parents[1] / "models" / "small-internvl"
CHAT = "/v1/chat/completions"
PROBE = "127.0.0.9"


def body_of(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"model": SMALL.name, "messages": messages, "max_tokens": 4, **fields}).encode()


def url_part(content: bytes) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def cheap(changes: random.Random) -> bytes:
    """Return the body of a small request, most of them broken."""
    question = body_of(user(image_part(picture(changes.randrange(50), (90, 70))), "what"))
    kind = changes.randrange(8)
    if kind == 0:
        return question
    if kind == 1:  # bytes changed anywhere
        changed = bytearray(question)
        for _ in range(changes.randrange(1, 20)):
            changed[changes.randrange(len(changed))] = changes.randrange(256)
        return bytes(changed)
    if kind == 2:
        return question[: changes.randrange(len(question))]
    if kind == 3:  # a broken picture
        content = bytearray(encoded(picture(2, (60, 40)), changes.choice(("PNG", "JPEG", "WEBP"))))
        for _ in range(changes.randrange(1, 20)):
            content[changes.randrange(len(content))] = changes.randrange(256)
        return body_of(user(url_part(bytes(content)), "what"))
    if kind == 4:
        return body_of(user("X")).replace(
            b"X", changes.choice((b"\\ud800", b"\xff", b"\xed\xa0\x80", b"\\udfff"))
        )
    if kind == 5:
        field = changes.choice(
            ("temperature", "top_p", "stop", "seed", "n", "vico", "messages", "model", "x")
        )
        value: Any = changes.choice(
            (None, -1, 1e300, "a", [], {}, [[]], True, 2**65, "\u20ac" * 50, [None] * 9)
        )
        return (
            body_of(user("x"), **{field: value})
            if field != "messages"
            else json.dumps({field: value}).encode()
        )
    if kind == 6:
        return body_of(user(*["x"] * changes.randrange(1, 1100)))
    return changes.randbytes(changes.randrange(200))


def costly(changes: random.Random) -> bytes:
    """Return a body that costs time or memory."""
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: body_of(user(" " * 8_000_000)),
        lambda: body_of(user("a" * 30_000)),
        lambda: b"[" + b"{}," * 2_000_000 + b"{}]",
        lambda: body_of(user(image_part(Image.new("RGB", (5000, 5000))), "what")),
        lambda: body_of(user(url_part(b"A" * 6_000_000))),
        lambda: body_of(user("x"), **{f"k{n}": n for n in range(50_000)}),
    )
    return changes.choice(makers)()


class Load:
    """Threads that share a number of requests."""

    def __init__(self, server: Served, num_requests: int, headers: dict[str, str] | None = None):
        host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
        self.address, self.left = (host, int(port)), num_requests
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.statuses: Counter[int] = Counter()
        self.num_left_early = 0
        self.lock = threading.Lock()

    def take(self) -> int:
        with self.lock:
            self.left -= 1
            return self.left

    def post(self, body: bytes, source: str, timeout_s: float = 120) -> tuple[int, float]:
        started = time.perf_counter()
        connection = http.client.HTTPConnection(*self.address, timeout=timeout_s, source_address=(source, 0))
        with closing(connection):
            connection.request("POST", CHAT, body, self.headers)
            response = connection.getresponse()
            response.read()
            return response.status, time.perf_counter() - started

    def work(self, number: int) -> None:
        changes = random.Random(number)
        while (left := self.take()) >= 0:
            body = costly(changes) if left % 50 == 0 else cheap(changes)
            if left % 97 == 0:  # a client that leaves
                with suppress(OSError), socket.create_connection(self.address, 5) as leaving:
                    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                with self.lock:
                    self.num_left_early += 1
                continue
            status, _ = self.post(body, "127.0.0.1")
            with self.lock:
                self.statuses[status] += 1

    def probe(self, waits: dict[str, list[float]], is_over: threading.Event) -> None:
        question = body_of(user("hello"), max_tokens=2)
        while not is_over.wait(0.2):
            started = time.perf_counter()
            connection = http.client.HTTPConnection(*self.address, timeout=60, source_address=(PROBE, 0))
            with closing(connection):
                connection.request("GET", "/health")
                connection.getresponse().read()
            waits["health"].append(time.perf_counter() - started)
            status, seconds = self.post(question, PROBE)
            waits["answer" if status == 200 else f"refused {status}"].append(seconds)


def memory(server: Served, name: str) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=16)
    arguments = parser.parse_args()
    server = Served(SMALL, "--max-body-mb", "16", "--picture-cache-mb", "16").started()
    assert server.process.stdout is not None
    allowed = int(server.process.stdout.readline().split("at most ")[1].split()[0]) * 2**20
    before = memory(server, "VmRSS")
    load = Load(server, arguments.requests)
    waits: defaultdict[str, list[float]] = defaultdict(list)
    is_over = threading.Event()
    prober = threading.Thread(target=load.probe, args=(waits, is_over))
    workers = [threading.Thread(target=load.work, args=(n,)) for n in range(arguments.connections)]
    started = time.perf_counter()
    for thread in (prober, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    seconds = time.perf_counter() - started
    is_over.set()
    prober.join()
    peak = memory(server, "VmHWM") - before
    code, errors = server.end()
    report = {
        "requests": arguments.requests,
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(load.statuses.items())),
        "left_early": load.num_left_early,
        "longest_wait_s": {name: round(max(values), 2) for name, values in waits.items() if values},
        "probes": {name: len(values) for name, values in waits.items()},
        "peak_mib": peak // 2**20,
        "announced_mib": allowed // 2**20,
        "exit_code": code,
        "log_lines": errors.count("\n"),
    }
    print(json.dumps(report))
    sys.exit(any(status >= 500 for status in load.statuses) or peak > allowed or bool(errors))


if __name__ == "__main__":
    main()
