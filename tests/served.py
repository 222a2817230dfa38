"""`vico serve` in a process of its own, and what its tests send."""

import base64
import io
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
from PIL import Image

from tests.waiting import PATIENCE_S


class Served:
    """A running server: its process, its address and a client."""

    def __init__(self, model: Path, *options: str):
        command = [sys.executable, "-m", "pipeline.cli", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        self.name = model.name

    def started(self) -> "Served":
        line = self.process.stdout.readline()
        assert line.startswith(f"serving {self.name} at http://127.0.0.1:"), (
            line,
            self.process.stderr.read(),
        )
        self.url = line.split()[-1]
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=PATIENCE_S)
        return self

    def ask(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        return self.client.chat.completions.create(model=self.name, messages=messages, **options)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors


def command_of(process: psutil.Process) -> str:
    """Return the command line of a process; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def schemathesis_command(server: Served, key: str, max_examples: int, seed: int) -> list[str]:
    """Return the command that sends requests by the server's own document, valid and invalid ones.

    It ends with an error code if an answer is not as the document says, or a fault of the server.
    """
    checks = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "unsupported_method",
        "ignored_auth",
    )
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "run", f"{server.url[:-3]}/openapi.json", "-H", f"Authorization: Bearer {key}"]
    command += ["--checks", ",".join(checks), "--seed", str(seed), "--max-examples", str(max_examples)]
    return [*command, "--request-timeout", "60", "--generation-database", "none"]


def picture(seed: int = 0, size: tuple[int, int] = (190, 130)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def data_url(image: Image.Image, format: str = "PNG") -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(image, format)).decode()


def image_part(image: Image.Image, format: str = "PNG", **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image, format), **options}}


def user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def get(url: str, **options: Any) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
