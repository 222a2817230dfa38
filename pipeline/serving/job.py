"""A conversation that waits for its answer, and the events of the answer."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.serving.conversation import Chat
from pipeline.serving.limits import RequestError


@dataclass(frozen=True)
class Event:
    """A piece of an answer. The last event has `finish_reason` and `usage`, or `error`."""

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    routing: Mapping[str, Any] | None = None
    error: RequestError | None = None


@dataclass
class Job:
    """A conversation to answer. The engine's thread calls `send`; setting `cancelled` ends the job early."""

    chat: Chat
    send: Callable[[Event], object]
    cancelled: threading.Event = field(default_factory=threading.Event)
