"""One replica: an engine in a process of Ray Serve, which answers jobs of the server in front of it.

Ray Serve's classes stay out of this file, so that the class is an ordinary one.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack

from cluster.sources.in_worker import code_here, leave_no_core
from pipeline.serving.answer import Prompt
from pipeline.serving.conversation import Chat
from pipeline.serving.job import Event, Job
from pipeline.serving.start.engine import Answering, running_engine
from pipeline.serving.start.settings import ServerSettings

logger = logging.getLogger(__name__)


class Replica:
    """Opens the model when it starts. `expected` is the digest of the server's code."""

    def __init__(self, expected: str, answering: Answering, settings: ServerSettings):
        leave_no_core()
        own = code_here()
        if own["digest"] != expected:
            raise RuntimeError(
                f"host {own['host']} has other code than the server ({own['digest'][:12]}, not "
                f"{expected[:12]}); install the same version there"
            )
        self._held = ExitStack()
        served = answering.opened(settings)
        self._engine = self._held.enter_context(running_engine(served, answering.folder, settings))

    async def answer(self, chat: Chat, prompt: Prompt, client: str) -> AsyncIterator[Event]:
        """Yield the events of an answer. The job ends when the caller cancels it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = Job(chat, prompt, lambda event: loop.call_soon_threadsafe(events.put_nowait, event), client)
        self._engine.submit(job)
        try:
            while True:
                event = await events.get()
                yield event
                if event.is_last:
                    return
        finally:
            self._engine.cancel(job)  # changes nothing for a job that has ended

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has ended; Ray Serve then replaces this replica.

        A vLLM that starts again is not a fault of the replica.
        """
        if self._engine.status == "stopping":
            raise RuntimeError("the engine has ended; see the replica's log")

    def __del__(self) -> None:
        """End the engine, and vLLM with it. Ray Serve calls it when it stops a replica."""
        held = getattr(self, "_held", None)
        if held is not None:
            held.close()
