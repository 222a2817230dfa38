"""The server's connections: their number is limited, and a client that is too slow is cut off.

uvicorn has no time limit for the head of a request and none for the end of a response.
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serving.limits import Limits, RequestError

_MAX_CONNECTIONS = 512
_MAX_AHEAD_BYTES = 64 * 1024
"""What a client may send beyond a request before its answer is complete."""
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 503: b"Service Unavailable"}


@dataclass
class OpenConnections:
    """Counts connections, in all and by address; `proxies` are addresses that stand for many clients."""

    limits: Limits
    proxies: tuple[str, ...] = ()
    num_open: int = 0
    _by_address: Counter[str] = field(default_factory=Counter)

    def has_room(self, address: str) -> bool:
        per_client = _MAX_CONNECTIONS if address in self.proxies else 3 * _MAX_CONNECTIONS // 4
        return self.num_open < _MAX_CONNECTIONS and self._by_address[address] < per_client

    def add(self, address: str) -> None:
        self.num_open += 1
        self._by_address[address] += 1

    def remove(self, address: str) -> None:
        self.num_open -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class LimitedConnection(H11Protocol):
    """One connection, which must send the whole head of each request within `limits.header_timeout_s`."""

    def __init__(self, open_connections: OpenConnections, **uvicorn: Any):
        super().__init__(**uvicorn)
        self._open, self._limits = open_connections, open_connections.limits
        self._address = ""
        self._is_counted = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        if not self._open.has_room(self._address):
            message = "too many connections, of this client or in all; try again later"
            self._refuse(RequestError(message, status=503, code="too_many_connections"))
            return
        self._open.add(self._address)
        self._is_counted = True
        self._end_timer = self.loop.call_later(self._limits.idle_timeout_s, self._check_end)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_counted:
            self._open.remove(self._address)
            self._is_counted = False
        for timer in (self._head_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._keep_reading()
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the form of all other errors."""
        self._refuse(RequestError(msg, code="invalid_http"))

    def _watch_head(self) -> None:
        """Run the timer while the head of a request is awaited; uvicorn's own runs between two requests."""
        is_awaited = (
            self.conn.their_state is h11.IDLE
            and self.timeout_keep_alive_task is None
            and not self.transport.is_closing()
        )
        if is_awaited and self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.header_timeout_s, self._head_is_late)
        elif not is_awaited and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _keep_reading(self) -> None:
        """Read on while a request is answered, also if the client has sent more than that request.

        uvicorn then stops reading, and would not see that the client leaves.
        """
        if self.conn.their_state is not h11.DONE or self.transport.is_closing():
            return
        if len(self.conn.trailing_data[0]) > _MAX_AHEAD_BYTES:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def _head_is_late(self) -> None:
        message = f"no whole request head within {self._limits.header_timeout_s:g} s"
        self._refuse(RequestError(message, status=408, code="request_timeout"))

    def _refuse(self, error: RequestError) -> None:
        """Send an error, written by hand since h11 may be in any state, and end the connection."""
        content = json.dumps(error.body).encode()
        head = b"HTTP/1.1 %d %s\r\n" % (error.status, _REASONS[error.status])
        head += b"content-type: application/json\r\nconnection: close\r\n"
        if error.status == 503:
            head += b"retry-after: 2\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(content) + content)
        self.transport.close()
        self._end_timer = self.loop.call_later(self._limits.idle_timeout_s, self.transport.abort)

    def _check_end(self) -> None:
        """Abort a connection that should end, or has a whole response to send, and does not get rid of it."""
        is_over = self.transport.is_closing() or (self.cycle is not None and self.cycle.response_complete)
        if is_over and self.transport.get_write_buffer_size() > 0:
            self.transport.abort()
            return
        self._end_timer = self.loop.call_later(self._limits.idle_timeout_s, self._check_end)
