"""The answer to one job of the engine as OpenAI's objects: one completion, or the chunks of a stream."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pipeline.serving.conversation import Chat
from pipeline.serving.engine import Engine
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import RequestError

_DISCONNECT_POLL_S = 0.5
"""How often a waiting answer checks that its client is still connected."""
IsDisconnected = Callable[[], Awaitable[bool]]


class ChatResponse:
    """One submitted job. Create it in the event loop."""

    def __init__(self, engine: Engine, chat: Chat, model_name: str):
        self.chat = chat
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.job = Job(chat, lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event))
        created = int(time.time())
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": created, "model": model_name}
        engine.submit(self.job)

    async def event(self, is_disconnected: IsDisconnected | None = None) -> Event:
        """Return the next event; raise the error that it carries. Cancel the job if the client
        disconnects."""
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), _DISCONNECT_POLL_S)
            except TimeoutError:
                if is_disconnected is not None and await is_disconnected():
                    self.job.cancelled.set()
                continue
            except asyncio.CancelledError:
                self.job.cancelled.set()
                raise
            if event.error is not None:
                raise event.error
            return event

    async def completion(self, event: Event, is_disconnected: IsDisconnected) -> dict[str, Any]:
        """Return the whole answer, which begins with `event`."""
        text = event.text
        while event.finish_reason is None:
            event = await self.event(is_disconnected)
            text += event.text
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": event.finish_reason, "logprobs": None}
        completion = {"object": "chat.completion", **self._head, "choices": [choice], "usage": event.usage}
        return {**completion, **self._report(event)}

    async def chunks(self, event: Event) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of the answer, which begins with `event`."""
        options = self.chat.request.stream_options
        yield self._chunk({"role": "assistant", "content": ""})
        while True:
            if event.text:
                yield self._chunk({"content": event.text})
            if event.finish_reason is not None:
                break
            try:
                event = await self.event()
            except RequestError as error:  # too late for a status: clients raise the error in the chunk
                yield error.body
                return
        yield {**self._chunk({}, event.finish_reason), **self._report(event)}
        if options is not None and options.include_usage:
            yield {**self._chunk({}), "choices": [], "usage": event.usage}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {"object": "chat.completion.chunk", **self._head, "choices": [choice]}

    def _report(self, event: Event) -> dict[str, Any]:
        return {"vico": event.routing} if self.chat.request.vico.report else {}
