"""A conversation that waits for its answer, and the events of the answer."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.serving.answer import Prompt
from pipeline.serving.conversation import Chat
from pipeline.serving.limits import RequestError


@dataclass(frozen=True)
class Event:
    """A piece of an answer. The last event has `finish_reason` and `usage`, or `error`.

    `logprobs` has an entry, in OpenAI's form, for each token whose text is in the event. `fault` is what the
    server's log says about an error; the client does not get it.
    """

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    routing: Mapping[str, Any] | None = None
    error: RequestError | None = None
    logprobs: tuple[Mapping[str, Any], ...] = ()
    fault: str = ""

    @property
    def is_last(self) -> bool:
        return self.error is not None or self.finish_reason is not None


@dataclass(eq=False)
class Job:
    """A conversation to answer. `send` is called from any thread; `cancelled` ends the job early.

    `client` is who asked: the engine takes the jobs of several clients in turn.
    """

    chat: Chat
    prompt: Prompt
    send: Callable[[Event], object]
    client: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: bool = False

    def emit(self, event: Event) -> None:
        """Send an event, unless the last one was sent before."""
        with self._lock:
            if self._ended:
                return
            self._ended = event.is_last
            self.send(event)

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for more of this answer."""
        return self._ended or self.cancelled.is_set()
