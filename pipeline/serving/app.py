"""The HTTP side of `vico serve`: OpenAI's chat completions, its list of models, and a health check.

The event loop only moves bytes: two threads parse the bodies, and the engine's thread computes the answers.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pipeline.serving.chat_response import ChatResponse
from pipeline.serving.conversation import Chat, parsed_chat
from pipeline.serving.engine import Engine
from pipeline.serving.job import Event
from pipeline.serving.limits import RequestError

_BODY_TIMEOUT_S = 60
"""A client that sends nothing for so long loses its place in the server."""


class Server:
    """The routes over one engine. `num_open` counts the requests that are being read, waiting or answered."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.num_open = engine, name, 0
        self.started = int(time.time())
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="reader")

    def app(self) -> FastAPI:
        app = FastAPI(title="vico", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name:path}", self.model)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_exception_handler(RequestError, _refusal)
        app.add_exception_handler(HTTPException, _refusal)
        return app

    async def health(self) -> JSONResponse:
        """Answer 200 while the engine works, 503 while it stops."""
        alive = self.engine.alive()
        content = {"status": "ok" if alive else "stopping", "model": self.name, "requests": self.num_open}
        return JSONResponse(content, 200 if alive else 503)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_name(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "vico"}

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"the model {name!r} does not exist; this server has {self.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")

    async def chat(self, request: Request) -> Response:
        """Answer a chat request, in one piece or as server-sent events."""
        limit = self.engine.limits.waiting
        if self.num_open >= limit:
            message = f"{limit} requests are being served, this server's limit; try again later"
            raise RequestError(message, status=429, code="too_many_requests")
        self.num_open += 1
        streaming = False
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                raise RequestError("the content type must be application/json", status=415)
            response = ChatResponse(self.engine, await self._chat(request), self.name)
            # A refusal by the engine comes as the first event, in time for an HTTP status.
            first = await response.event(request.is_disconnected)
            if not response.chat.request.stream:
                return JSONResponse(await response.completion(first, request.is_disconnected))
            streaming = True
            return StreamingResponse(self._stream(response, first), media_type="text/event-stream")
        finally:
            if not streaming:
                self.num_open -= 1

    async def _stream(self, response: ChatResponse, first: Event) -> AsyncIterator[str]:
        try:
            async for chunk in response.chunks(first):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        finally:  # also if the client disconnected
            response.job.cancelled.set()
            self.num_open -= 1

    async def _chat(self, request: Request) -> Chat:
        """Return the checked request. Its body is freed before the answer is computed."""
        body = await self._body(request)
        loop = asyncio.get_running_loop()
        control_tokens = self.engine.served.prompts.control_tokens
        chat = await loop.run_in_executor(
            self._readers, parsed_chat, body, self.engine.limits, control_tokens
        )
        self._check_name(chat.request.model)
        return chat

    async def _body(self, request: Request) -> bytes:
        limit = self.engine.limits.body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        message = f"the body is above this server's limit of {limit} bytes"
                        raise RequestError(message, status=413, code="body_too_large")
        except TimeoutError as error:
            raise RequestError(f"no whole body within {_BODY_TIMEOUT_S} s", status=408) from error
        return bytes(body)


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    """Return any refusal in OpenAI's form, also for unknown paths and methods."""
    if isinstance(error, HTTPException):
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    assert isinstance(error, RequestError)
    return JSONResponse(error.body, error.status)
