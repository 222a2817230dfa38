"""The answer to one job of the engine as OpenAI's objects: one completion, or the chunks of a stream."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from pipeline.serving.conversation import Chat
from pipeline.serving.job import Event
from pipeline.serving.limits import RequestError

NextEvent = Callable[[], Awaitable[Event]]
"""Returns the next event of an answer, or raises the error that it carries."""


class ChatResponse:
    """The events of one job. Create it in the event loop; `send` may be called from any thread."""

    def __init__(self, chat: Chat, model_name: str):
        self.chat = chat
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        created = int(time.time())
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": created, "model": model_name}

    def send(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def event(self) -> Event:
        """Return the next event; raise the error that it carries."""
        event = await self._events.get()
        if event.error is not None:
            raise event.error
        return event

    async def completion(self, event: Event, following: NextEvent) -> tuple[dict[str, Any], Event]:
        """Return the whole answer, which begins with `event`, and the last event."""
        text, entries = event.text, [*event.logprobs]
        while event.finish_reason is None:
            event = await following()
            text += event.text
            entries += event.logprobs
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": event.finish_reason,
            "logprobs": self._logprobs(entries),
        }
        completion = {"object": "chat.completion", **self._head, "choices": [choice], "usage": event.usage}
        return {**completion, **self._report(event)}, event

    async def chunks(self, event: Event, following: NextEvent) -> AsyncIterator[tuple[dict[str, Any], Event]]:
        """Yield the chunks of the answer, which begins with `event`, each with the event that it is of."""
        options = self.chat.request.stream_options
        yield self._chunk({"role": "assistant", "content": ""}), Event()
        while True:
            if event.text or event.logprobs:
                yield self._chunk({"content": event.text}, entries=event.logprobs), Event()
            if event.finish_reason is not None:
                break
            try:
                event = await following()
            except RequestError as error:  # too late for a status: clients raise the error in the chunk
                yield error.body, Event(error=error)
                return
        yield {**self._chunk({}, event.finish_reason), **self._report(event)}, event
        if options is not None and options.include_usage:
            yield {**self._chunk({}), "choices": [], "usage": event.usage}, Event()

    def _chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        entries: Iterable[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        logprobs = self._logprobs(list(entries)) if "content" in delta and "role" not in delta else None
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return {"object": "chat.completion.chunk", **self._head, "choices": [choice]}

    def _logprobs(self, entries: list[Mapping[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self.chat.request.logprobs else None

    def _report(self, event: Event) -> dict[str, Any]:
        return {"vico": event.routing} if self.chat.request.vico.report else {}
