"""The process of vLLM: started with the language model, watched, and started again after it died."""

import http.client
import logging
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.launchers.driver_process import die_with_parent
from vico.errors import UserError, last_line, one_line

logger = logging.getLogger(__name__)

MODEL_NAME = "language"
_LOG_BYTES = 2**20
"""How much of the end of vLLM's log is searched for the reason of its end."""
_PORTS = range(20_000, 32_768)
"""Linux gives ports from 32768 on to outgoing connections, Ray gives those up to 19999 to its workers."""
_POLL_S, _END_S, _LONGEST_PAUSE_S = 0.5, 20.0, 60.0


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM is started: the Python of its environment, its model, and further arguments of `vllm
    serve`."""

    python: str
    folder: Path
    dtype: str
    total_tokens: int
    batch: int
    arguments: tuple[str, ...] = ()
    log: Path | None = None
    """None: beside the folder, with the ending `.log`."""


class VllmProcess:
    """A running `vllm serve`. `generation` counts its starts; `is_ready` is False while it starts again."""

    def __init__(self, settings: VllmSettings):
        self.settings = settings
        self.key = secrets.token_urlsafe(24)
        self.port = 0
        self.log = settings.log or settings.folder.with_name(f"{settings.folder.name}.log")
        self.generation = self._log_start = 0
        self._is_ready, self._is_stopping = threading.Event(), threading.Event()
        self._process = self._started()
        self._await_ready()
        if not self._is_ready.is_set():
            raise UserError(f"--engine vllm: vLLM ended at its start ({self._reason()}); see {self.log}")
        threading.Thread(target=self._watch, name="vllm", daemon=True).start()

    @property
    def is_ready(self) -> bool:
        return self._is_ready.is_set()

    def stop(self) -> None:
        """End the process and all that it started."""
        self._is_stopping.set()
        self._end()

    def _started(self) -> "subprocess.Popen[bytes]":
        settings = self.settings
        self.port = _free_port()  # another process may have taken the last one meanwhile
        command = [settings.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += [
            "--model",
            str(settings.folder),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            MODEL_NAME,
        ]
        command += ["--enable-prompt-embeds", "--generation-config", "vllm", "--dtype", settings.dtype]
        command += ["--max-model-len", str(settings.total_tokens), "--max-num-seqs", str(settings.batch)]
        command += ["--max-logprobs", "20", *settings.arguments]
        environment = os.environ | {
            "VLLM_API_KEY": self.key,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("PYTHONPATH", None)  # it is another environment
        try:
            with open(self.log, "ab") as log:
                self._log_start = log.tell()
                return subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                    cwd="/",
                    preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # so it can end its own children
                )
        except OSError as error:
            raise UserError(
                f"--engine-python={settings.python}: {error}; give the python of an environment with vLLM"
            ) from error

    def _await_ready(self) -> None:
        """Return once the process answers, ended, or should end."""
        while self._process.poll() is None and not self._is_stopping.is_set():
            if self._answers():
                self.generation += 1
                self._is_ready.set()
                return
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with closing(connection):
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False

    def _watch(self) -> None:
        pause = 1.0
        while True:
            started = time.monotonic()
            code = self._process.wait()
            self._is_ready.clear()
            if self._is_stopping.is_set():
                return
            self._end()
            reason = self._reason()
            logger.error("vLLM ended with code %s (%s); it starts again; see %s", code, reason, self.log)
            pause = 1.0 if time.monotonic() - started > _LONGEST_PAUSE_S else min(2 * pause, _LONGEST_PAUSE_S)
            if self._is_stopping.wait(pause):
                return
            try:
                self._process = self._started()
            except UserError as error:  # its environment may be replaced at the moment
                logger.error("%s", error)
                continue
            self._await_ready()

    def _reason(self) -> str:
        """Return why the process ended, from what it wrote: its last error that names a cause."""
        with open(self.log, "rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - _LOG_BYTES))
            text = log.read().decode(errors="replace")
        errors = re.findall(r"\b\w+(?:Error|Exception): .+", text)
        causes = [error for error in errors if "above" not in error]
        return one_line((causes or errors)[-1]) if errors else last_line(text)

    def _end(self) -> None:
        """End the session: vLLM's engine is a child of its own, which may outlive the server."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                continue


def _free_port() -> int:
    """Return a port on which nothing listens, and which no other process gets by itself before vLLM does."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def engine_arguments(values: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments of `--engine-arg`; raise UserError for one that does not begin with `--`."""
    for value in values:
        if not value.startswith("--"):
            raise UserError(f"--engine-arg={value}: give an argument of `vllm serve`, as --name=value")
    return tuple(values)
