"""A real S3 server (moto) in a separate process, and a proxy in front of it that injects faults."""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.ports import free_port
from tests.waiting import PATIENCE_S, wait_until

HOST = "127.0.0.1"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_HOP_HEADERS = ("transfer-encoding", "connection", "content-length")


def half(number: int) -> bool:
    """Choose half of the requests at random; every second one would always be the second of two requests."""
    return random.Random(f"fault {number}").random() < 0.5


FAULTS: dict[str, Callable[[int], str | None]] = {
    "none": lambda number: None,
    "503 half of the time": lambda number: "503" if half(number) else None,
    "bodies stop half of the time": lambda number: "stop" if half(number) else None,
}


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests to an S3 server, or answers them with a fault.

    `fault` is called with the number of each request, from 0, and returns None, "503", "403", "400 CODE"
    (with this code of S3), or "stop" (the body ends half way through). `fault_of` is called with method and
    path instead.
    """

    daemon_threads = True

    def __init__(self, target_port: int) -> None:
        super().__init__((HOST, 0), _Handler)
        self.target_port, self.num_requests = target_port, 0
        self.fault: Callable[[int], str | None] = lambda number: None
        self.fault_of: Callable[[str, str], str | None] = lambda method, path: None
        self.dropped_headers: tuple[str, ...] = ()
        self.faults: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _forward(self) -> None:
        with self.server.lock:
            fault = self.server.fault(self.server.num_requests) or self.server.fault_of(
                self.command, self.path
            )
            self.server.num_requests += 1
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        if fault is not None and fault != "stop":
            status, _, code = fault.partition(" ")
            answer = f"<Error><Code>{code}</Code><Message>planted</Message></Error>".encode() if code else b""
            self.server.faults.append(fault)
            self.send_response(int(status))
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        connection = http.client.HTTPConnection(HOST, self.server.target_port, timeout=PATIENCE_S)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in self.server.dropped_headers
        }
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header(
            "Content-Length", response.getheader("Content-Length", "0") if is_head else str(len(data))
        )
        self.end_headers()
        if fault == "stop" and self.command == "GET" and len(data) > 10:
            self.server.faults.append(fault)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if not is_head:
            self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def s3_server() -> Iterator[FaultyProxy]:
    """Provide a proxy in front of a running server; stop both at the end."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        proxy = FaultyProxy(port)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        proxy.server_close()
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/moto-api/", timeout=2).close()
            return True
        except OSError:
            return False

    wait_until(answers, process, pause_s=0.1)


def upload(proxy: FaultyProxy, bucket: str, files: dict[str, bytes]) -> None:
    """Write objects by their keys to a bucket, which is created if necessary."""
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=f"http://{HOST}:{proxy.target_port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket=bucket)
    for key, data in files.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)


def environment(proxy: FaultyProxy, patience_s: float = 30) -> dict[str, str]:
    """Return the environment variables that direct S3 requests to the proxy."""
    return {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL_S3": proxy.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "VICO_REMOTE_PATIENCE_S": str(patience_s),
        "NO_PROXY": f"{HOST},localhost," + os.environ.get("NO_PROXY", ""),
    }
