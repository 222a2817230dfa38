"""The HTTP side of `vico serve`: OpenAI's chat completions, its list of models, and a health check.

The event loop only moves bytes: bodies are parsed in two threads, answers come from the engine's own.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pipeline.serving.engine import Engine, Event, Job
from pipeline.serving.requests import Chat, RequestError, chat_of

_BODY_TIMEOUT_S = 60  # a client that sends nothing must not hold a place for ever
_LOOK_S = 0.5  # how often a waiting answer looks whether its client is still there


class Server:
    """The routes over one engine. `num_open` counts the requests being read, waiting or answered."""

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
        """200 while the engine answers, 503 when it stops."""
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
        """An answer, whole or as server-sent events."""
        limit = self.engine.limits.waiting
        if self.num_open >= limit:
            message = f"{limit} requests are being served, this server's limit; try again later"
            raise RequestError(message, status=429, code="too_many_requests")
        self.num_open += 1
        streaming = False
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                raise RequestError("the content type must be application/json", status=415)
            answer = _Answer(self.engine, await self._chat(request), self.name)
            first = await answer.event(request)  # a refusal can still be a status
            if not answer.chat.request.stream:
                return JSONResponse(await answer.whole(first, request))
            streaming = True
            return StreamingResponse(self._stream(answer, first), media_type="text/event-stream")
        finally:
            if not streaming:
                self.num_open -= 1

    async def _stream(self, answer: "_Answer", first: Event) -> AsyncIterator[str]:
        try:
            async for chunk in answer.chunks(first):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        finally:  # also when the client went away
            answer.job.cancelled.set()
            self.num_open -= 1

    async def _chat(self, request: Request) -> Chat:
        """The checked request; its body is let go before the answer is waited for."""
        body = await self._body(request)
        loop = asyncio.get_running_loop()
        chat = await loop.run_in_executor(self._readers, chat_of, body, self.engine.limits)
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


class _Answer:
    """One job of the engine as OpenAI's objects."""

    def __init__(self, engine: Engine, chat: Chat, name: str):
        self.chat = chat
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.job = Job(chat, lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event))
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        engine.submit(self.job)

    async def event(self, request: Request | None = None) -> Event:
        """The next event; raises the error it carries, and cancels the job where the client went away."""
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), _LOOK_S)
            except TimeoutError:
                if request is not None and await request.is_disconnected():
                    self.job.cancelled.set()
                continue
            except asyncio.CancelledError:
                self.job.cancelled.set()
                raise
            if event.error is not None:
                raise event.error
            return event

    async def whole(self, event: Event, request: Request) -> dict[str, Any]:
        text = event.text
        while event.finish_reason is None:
            event = await self.event(request)
            text += event.text
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": event.finish_reason, "logprobs": None}
        answer = {"object": "chat.completion", **self._head, "choices": [choice], "usage": event.usage}
        return {**answer, **self._report(event)}

    async def chunks(self, event: Event) -> AsyncIterator[dict[str, Any]]:
        options = self.chat.request.stream_options
        yield self._chunk({"role": "assistant", "content": ""})
        while True:
            if event.text:
                yield self._chunk({"content": event.text})
            if event.finish_reason is not None:
                break
            try:
                event = await self.event()
            except RequestError as error:  # too late for a status: the client raises what stands in the chunk
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


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    """Any refusal in OpenAI's form, unknown paths and methods included."""
    if isinstance(error, HTTPException):
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    assert isinstance(error, RequestError)
    return JSONResponse(error.body, error.status)
