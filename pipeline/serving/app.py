"""The HTTP side of `vico serve`: OpenAI's chat completions, its list of models, health and metrics.

The event loop only moves bytes: two threads parse and tokenise, the engine's thread computes the answers.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.answer import Prompt
from pipeline.serving.chat_response import ChatResponse
from pipeline.serving.conversation import Chat, parsed_chat
from pipeline.serving.http.access import Access, Places, header
from pipeline.serving.http.bodies import Refusal, read_body
from pipeline.serving.http.document import CHAT_ROUTE, JSON_ROUTE, METRICS_ROUTE, document
from pipeline.serving.http.gate import Gate
from pipeline.serving.http.metrics import CONTENT_TYPE, Metrics
from pipeline.serving.http.presence import ClientLeft, Presence, presence
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import RequestError, server_error
from pipeline.serving.memory import NUM_READERS
from pipeline.serving.running import AnswerEngine


class Server:
    """The routes over one engine."""

    def __init__(self, engine: AnswerEngine, name: str, metrics: Metrics, access: Access | None = None):
        self.engine, self.name, self.metrics = engine, name, metrics
        self.access = access or Access()
        self.places = Places(engine.limits)
        self.started = int(time.time())
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")
        metrics.gauge("vico_open_requests", "Whole requests in the server.", lambda: self.places.num_open)
        metrics.gauge(
            "vico_held_bytes", "Bytes of bodies in the server.", lambda: float(self.places.held_bytes)
        )
        metrics.gauge("vico_waiting_requests", "Requests without a row.", lambda: engine.num_waiting)
        metrics.gauge("vico_running_requests", "Requests with a row.", lambda: engine.num_running)
        metrics.gauge("vico_replicas", "Engines that can answer.", lambda: engine.num_replicas)
        metrics.gauge("vico_cache_tokens", "Tokens for which rows have room.", lambda: engine.num_reserved)

    def app(self) -> ASGIApp:
        """Return the routes behind the checks of host and key."""
        app = FastAPI(title="vico serve", docs_url=None, redoc_url=None)
        app.add_api_route("/health", self.health, **JSON_ROUTE)
        app.add_api_route("/metrics", self.figures, **METRICS_ROUTE)
        app.add_api_route("/v1/models", self.models, **JSON_ROUTE)
        app.add_api_route("/v1/models/{name:path}", self.model, **JSON_ROUTE)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], **CHAT_ROUTE)
        app.add_exception_handler(RequestError, _refusal)
        app.add_exception_handler(HTTPException, _refusal)
        app.add_exception_handler(ClientLeft, _nobody)
        app.add_exception_handler(Exception, _fault)
        app.openapi = lambda: document(app, self.name, bool(self.access.keys))  # type: ignore[method-assign]
        return Gate(app, self.access, self.metrics)

    async def health(self) -> JSONResponse:
        """Answer 200 while the engine works, 503 while it stops or starts again."""
        status = self.engine.status
        content = {
            "status": status,
            "model": self.name,
            "requests": self.places.num_open,
            "replicas": self.engine.num_replicas,
        }
        return JSONResponse(content, 200 if status == "ok" else 503)

    async def figures(self) -> Response:
        """Return the server's figures for Prometheus."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the one model."""
        self._check_name(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "vico"}

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"the model {name[:100]!r} does not exist; this server has {self.name!r}"
            raise RequestError(message, "model", status=404, code="model_not_found")

    async def chat(self, request: Request) -> Response:
        """Answer a conversation about pictures, in one piece or as server-sent events."""
        address = request.client.host if request.client else ""
        client = self.access.client(address, request.headers.get("authorization", ""))
        with ExitStack() as held:
            held.enter_context(self.places.of_client(client))
            self.places.check_room()
            if header(request.headers, "content-type") != "application/json":
                raise RequestError("the content type must be application/json", status=415)
            chat, prompt = await self._chat(request, held)
            response = ChatResponse(chat, self.name)
            watched = held.enter_context(presence(request))
            answer = _Answer(self, watched, response, Job(chat, prompt, response.send, client))
            held.enter_context(answer.submitted())
            # A refusal by the engine comes as the first event, in time for an HTTP status.
            first = await answer.first()
            if not chat.request.stream:
                return JSONResponse(await answer.whole(first))
            return _EventStream(answer, first, held.pop_all(), self.engine.limits.idle_timeout_s)

    async def _chat(self, request: Request, held: ExitStack) -> tuple[Chat, Prompt]:
        """Return the checked request. Its body is freed before the answer is computed.

        If the client leaves while a thread parses the body, its places are held until the thread is done with
        it, since its memory is.
        """
        body = await read_body(request, held.enter_context(self.places.memory()))
        held.enter_context(self.places.open_request())
        loop, served = asyncio.get_running_loop(), self.engine.served

        def parsed() -> tuple[Chat, Prompt]:
            chat = parsed_chat(body, self.engine.limits, served.prompts.control_tokens)
            self._check_name(chat.request.model)
            return chat, served.prompt(chat)

        return await loop.run_in_executor(self._readers, parsed)


class _Answer:
    """One job of the engine, submitted and read while its client is connected."""

    def __init__(self, server: Server, client: Presence, response: ChatResponse, job: Job):
        self.response, self.job = response, job
        self._server, self._client = server, client
        self._started = time.perf_counter()

    @contextmanager
    def submitted(self) -> Iterator[None]:
        """Let the engine compute the answer until the end of the block."""
        self._server.engine.submit(self.job)
        try:
            yield
        finally:
            self._server.engine.cancel(self.job)  # changes nothing for a job that has ended

    async def event(self) -> Event:
        """Return the next event. Raises ClientLeft, and the error that the event carries."""
        return await self._client.unless_left(self.response.event())

    async def first(self) -> Event:
        """Return the first event."""
        event = await self.event()
        self._server.metrics.first_token_s.observe(time.perf_counter() - self._started)
        return event

    async def whole(self, first: Event) -> dict[str, Any]:
        """Return the whole answer in one piece."""
        completion, last = await self.response.completion(first, self.event)
        self.count(last)
        return completion

    def chunks(self, first: Event) -> AsyncIterator[tuple[dict[str, Any], Event]]:
        """Yield the chunks of the answer, each with the event that it is of."""
        return self.response.chunks(first, self.event)

    def count(self, event: Event) -> None:
        """Count the last event of an answer."""
        if event.usage is not None and event.routing is not None:
            self._server.metrics.answer(event.usage, event.routing)
            self._server.metrics.answer_s.observe(time.perf_counter() - self._started)


class _EventStream(Response):
    """An answer as server-sent events. It holds what the request holds until its end."""

    def __init__(self, answer: _Answer, first: Event, held: ExitStack, idle_timeout_s: float):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._answer, self._first, self._held = answer, first, held
        self._idle_timeout_s = idle_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held, suppress(ClientLeft):  # the connection ends, as its response is not complete
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk, event in self._answer.chunks(self._first):
                await self._send(send, f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n", True)
                self._answer.count(event)
            await self._send(send, "data: [DONE]\n\n", True)
            await self._send(send, "", False)

    async def _send(self, send: Send, text: str, more: bool) -> None:
        """Send a piece; raise ClientLeft if the client takes none for too long."""
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
        except TimeoutError as error:
            raise ClientLeft from error


async def _nobody(request: Request, error: Exception) -> Response:
    """Return what no client reads; its status is counted."""
    return Response(status_code=499)


async def _fault(request: Request, error: Exception) -> Response:
    """Return the error of a fault of the server, which the gate logs."""
    return Refusal(server_error(error))


async def _refusal(request: Request, error: Exception) -> Response:
    """Return any refusal in OpenAI's form, also for unknown paths and methods."""
    if isinstance(error, HTTPException):
        shown = f"{request.method} {request.url.path[:100]}: {error.detail}"
        refused = RequestError(shown, status=error.status_code)
        response = Refusal(refused)
        response.headers.update(error.headers or {})
        return response
    assert isinstance(error, RequestError)
    return Refusal(error)
