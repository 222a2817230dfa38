"""Reading of a request's body, within limits of size, time and memory; and the answer that refuses a
request."""

import asyncio
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from pipeline.serving.http.access import HeldMemory
from pipeline.serving.http.presence import ClientLeft
from pipeline.serving.limits import Limits, RequestError

_LINGER_S, _LINGER_BYTES = 2.0, 64 * 2**20
"""How much of an unread body is thrown away, so that the client reads its refusal before the end of the
connection."""
_BODY_READ = "vico.body_read"
"""The key of the ASGI scope that says that the whole body was read."""


async def read_body(request: Request, memory: HeldMemory) -> bytearray:
    """Return the body, whose bytes are taken from `memory`.

    A body that is declared too large is refused before any of it is read. Raises RequestError, and
    ClientLeft.
    """
    limits = memory.places.limits
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                async with asyncio.timeout(limits.idle_timeout_s):
                    message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                piece = message.get("body", b"")
                memory.take(len(piece))
                body += piece
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
                if not message.get("more_body", False):
                    request.scope[_BODY_READ] = True
                    return body
    except TimeoutError as error:
        reason = f"no whole body in {limits.body_timeout_s:g} s, or nothing for {limits.idle_timeout_s:g} s"
        raise RequestError(reason, status=408, code="request_timeout") from error


def _too_large(limits: Limits) -> RequestError:
    message = f"the body is above this server's limit of {limits.body_bytes} bytes"
    return RequestError(message, status=413, code="body_too_large")


class Refusal(JSONResponse):
    """An error in OpenAI's form. If the body was not read, the connection ends after it."""

    def __init__(self, error: RequestError):
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(error.body, error.status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get(_BODY_READ):
            await super().__call__(scope, receive, send)
            return
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await _throw_away(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _throw_away(receive: Receive) -> None:
    room = _LINGER_BYTES
    while room > 0:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        room -= len(message.get("body", b""))
