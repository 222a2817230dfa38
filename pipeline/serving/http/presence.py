"""Whether the client of a request is still connected."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request

Result = TypeVar("Result")


class ClientLeft(Exception):
    """The client disconnected, so nobody waits for an answer."""


class Presence:
    """Notices when the client of a request disconnects. The body of the request must have been read."""

    def __init__(self, left: "asyncio.Task[None]"):
        self._left = left

    async def unless_left(self, awaitable: Awaitable[Result]) -> Result:
        """Return the result of an awaitable; cancel it and raise ClientLeft as soon as the client leaves.

        The calling task itself is never cancelled for it: `asyncio.wait_for` of Python 3.11, and any library
        that catches CancelledError, can swallow that, and the request would then wait for ever.
        """
        waiting = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait({waiting, self._left}, return_when=asyncio.FIRST_COMPLETED)
            if self._left.done():
                raise ClientLeft
            return waiting.result()
        finally:
            if not waiting.cancel() and not waiting.cancelled():
                waiting.exception()  # has been read: asyncio logs errors that nobody reads


@contextmanager
def presence(request: Request) -> Iterator[Presence]:
    """Watch the client of a request until the end of the block."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = asyncio.create_task(leave())
    try:
        yield Presence(left)
    finally:
        left.cancel()
