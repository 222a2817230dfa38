"""One replica: an engine in a process of Ray Serve, which answers jobs of the server in front of it."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from cluster.sources.in_worker import code_here, leave_no_core
from pipeline.serving.answer import Prompt
from pipeline.serving.conversation import Chat
from pipeline.serving.job import Event, Job
from pipeline.serving.replicas.figures import ReplicaFigures
from pipeline.serving.replicas.lease import end_without_server
from pipeline.serving.start.engine import Answering, running_engine
from pipeline.serving.start.model_digest import model_digest
from pipeline.serving.start.settings import ServerSettings
from vico.errors import one_line

logger = logging.getLogger(__name__)

REFUSAL = "this replica cannot start:"
"""Begins the reason in the error of a replica that does not start, by which the server knows it."""


@dataclass(frozen=True)
class Expected:
    """What a replica must have in common with its server: the digests of the code and of the model."""

    code: str
    model: str


class Replica:
    """Opens the model when it starts. `name` is that of its application.

    Raises RuntimeError with REFUSAL and the reason if it cannot start.
    """

    def __init__(self, name: str, expected: Expected, answering: Answering, settings: ServerSettings):
        leave_no_core()
        self._held = ExitStack()
        self._figures = ReplicaFigures()
        try:
            _refuse_other_code(expected)
            answering = answering.here()
            served = answering.opened(settings)
            if model_digest(answering.folder) != expected.model:
                raise ValueError(f"{answering.folder} has another model here than on the server; copy it")
            engine = running_engine(served, answering.folder, settings, self._figures.step)
            self._engine = self._held.enter_context(engine)
        except Exception as error:
            raise RuntimeError(f"{REFUSAL} host {socket.gethostname()}: {one_line(error)}") from error
        end_without_server(name)

    async def answer(self, chat: Chat, prompt: Prompt, client: str) -> AsyncIterator[Event]:
        """Yield the events of an answer. The job ends when the caller cancels it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = Job(chat, prompt, lambda event: loop.call_soon_threadsafe(events.put_nowait, event), client)
        self._engine.submit(job)
        try:
            while True:
                event = await events.get()
                yield event if event.error is None else _located(event)
                if event.is_last:
                    return
        finally:
            self._engine.cancel(job)  # changes nothing for a job that has ended

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has ended; Ray Serve then replaces this replica.

        A vLLM that starts again is not a fault of the replica.
        """
        self._figures.show(self._engine)
        if self._engine.status == "stopping":
            raise RuntimeError("the engine has ended; see the replica's log")

    def __del__(self) -> None:
        """End the engine, and vLLM with it. Ray Serve calls it when it stops a replica."""
        held = getattr(self, "_held", None)
        if held is not None:
            held.close()


def _refuse_other_code(expected: Expected) -> None:
    own = code_here()["digest"]
    if own != expected.code:
        raise ValueError(
            f"its code is not the server's ({own[:12]}, not {expected.code[:12]}); install the same version"
        )


def _located(event: Event) -> Event:
    """Return the event of an error with the process that it is from, for the log of the server."""
    reason = event.fault or str(event.error)
    return replace(event, fault=f"host {socket.gethostname()}, process {os.getpid()}: {reason}")
