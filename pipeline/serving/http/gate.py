"""What every request passes first: host, key, and the last resort for errors. Counts the responses."""

import asyncio
import logging
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.http.access import OPEN_PATHS, Access
from pipeline.serving.http.bodies import Refusal
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.limits import RequestError, server_error, stopping_error

logger = logging.getLogger(__name__)


class Gate:
    """An ASGI application that lets only allowed requests through to another."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics):
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def counted(message: Any) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                self._metrics.responses.labels(str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, counted)
        except (Exception, asyncio.CancelledError) as error:
            if not isinstance(error, RequestError | asyncio.CancelledError):
                logger.exception("a request failed")
            if not has_started:
                await Refusal(_request_error(error))(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._access.check_host(headers.get("host"))
        if scope["path"] not in OPEN_PATHS:
            self._access.check_key(headers.get("authorization"))


def _request_error(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, asyncio.CancelledError):  # the server did not wait any longer
        return stopping_error()
    return server_error(error)
