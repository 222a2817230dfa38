"""`vico serve`: a model behind an OpenAI-style chat endpoint, until SIGINT or SIGTERM.

The address is bound before the model is opened, so that a port in use is reported at once.
"""

import asyncio
import ipaddress
import logging
import math
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from pipeline.serving.answer import ServedModel
from pipeline.serving.app import Server
from pipeline.serving.http.connections import LimitedConnection, OpenConnections
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.limits import Limits
from pipeline.serving.memory import memory_bound
from pipeline.serving.running import AnswerEngine
from pipeline.serving.start.engine import Answering, language_folder, running_engine
from pipeline.serving.start.settings import ServerSettings
from pipeline.terminal.output import TerminalHandler, error_terminal, terminal
from vico.checkpoints.hub import model_folder, pinned_hub_id
from vico.errors import UserError, missing_package

_DISTRIBUTIONS = {"grpc": "grpcio", "grpc_reflection": "grpcio-reflection"}
"""Module -> package, of what Ray Serve imports; the others have the names of their modules."""
_GRACE_S = 3
"""How long clients may take to receive the end of their answers, after the last of them ended."""


def serve(
    name_or_folder: str,
    settings: ServerSettings,
    limits: Limits,
    threshold: float | None = None,
    rule: str | None = None,
) -> None:
    """Serve a model folder or Hub id until a signal comes. `limits.total_tokens` 0 means the model's own
    limit.

    Raises UserError for limits that contradict each other, a model that cannot be opened, a router without a
    threshold, an address in use, and replicas that do not start.
    """
    _check_limits(limits)
    logging.getLogger("pipeline").addHandler(TerminalHandler())
    listener = _listener(settings)
    with listener, ExitStack() as held:
        model = model_folder(name_or_folder)
        metrics = Metrics()
        answering = Answering(model, limits, threshold, rule, pinned_hub_id(name_or_folder))
        served = answering.opened(settings, weights=settings.replicas is None)
        port = listener.getsockname()[1]
        engine = held.enter_context(_engine(answering, served, settings, metrics, port))
        is_folder = Path(name_or_folder).is_dir()
        name = model.resolve().name if is_folder else name_or_folder
        config = _uvicorn_config(Server(engine, name, metrics, settings.access), settings, limits)
        _announce(name, listener, settings, served)
        _Stoppable(config, engine).run(sockets=[listener])


@contextmanager
def _engine(
    answering: Answering, served: ServedModel, settings: ServerSettings, metrics: Metrics, port: int
) -> Iterator[AnswerEngine]:
    """Run the engine in this process, or replicas of it, until the end of the block."""
    if settings.replicas is None:
        with running_engine(served, answering.folder, settings, metrics.step) as engine:
            yield engine
        return
    try:
        from pipeline.serving.replicas.application import application
        from pipeline.serving.replicas.engine import ReplicatedEngine
    except ModuleNotFoundError as error:
        module = (error.name or "ray").partition(".")[0]
        raise missing_package("--replicas", _DISTRIBUTIONS.get(module, module)) from error
    answering = replace(answering, folder=answering.folder.absolute())  # replicas work in other folders
    if settings.vllm is not None:
        language_folder(answering.folder, settings)  # once, before several replicas on this machine need it
    name = f"vico-{socket.gethostname()}-{port}"  # a server that starts again replaces what it left
    with application(name, answering, settings) as running:
        replicated = ReplicatedEngine(served, running)
        try:
            yield replicated
        finally:
            replicated.stop()
            replicated.join()


def _uvicorn_config(server: Server, settings: ServerSettings, limits: Limits) -> uvicorn.Config:
    connections = OpenConnections(limits, settings.proxies)
    return uvicorn.Config(
        server.app(),
        http=partial(LimitedConnection, connections),  # type: ignore[arg-type]  # it is called like a class
        ws="none",
        loop="asyncio",  # not uvloop where it happens to be installed
        # uvicorn's own messages are about broken clients; the gate logs faults of the server
        log_level="critical",
        access_log=False,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.drain_s) + _GRACE_S,
        lifespan="off",
    )


def _announce(name: str, listener: socket.socket, settings: ServerSettings, served: ServedModel) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    terminal().line(f"serving {name} at http://{shown}:{port}/v1")
    mebibytes = f"{memory_bound(served) // 2**20} MiB of memory beside the model"
    if settings.replicas is None:
        terminal().line(f"answering takes at most {mebibytes}")
    else:
        number = settings.replicas.number
        terminal().line(
            f"answering takes at most {mebibytes} in each of {number} replicas, and in the server"
        )
    for warning in warnings(host, settings, served.limits):
        error_terminal().line(f"warning: {warning}")


def warnings(host: str, settings: ServerSettings, limits: Limits) -> Iterator[str]:
    """Yield what is allowed and rarely meant: a server open to all, and replicas that cannot all work."""
    if not ipaddress.ip_address(host).is_loopback and not settings.access.keys:
        yield "no key is required; whoever reaches this address can use it; give --api-key-file"
    number = 1 if settings.replicas is None else settings.replicas.number
    if number > 1 and limits.waiting < number * limits.batch:
        yield (
            f"--max-requests={limits.waiting} of all clients is below the {number * limits.batch} answers "
            f"that {number} replicas compute at once (--max-batch={limits.batch} each); raise it"
        )


class _Stoppable(uvicorn.Server):
    """A server that also ends the running answers on a signal, and then exits with code 0."""

    def __init__(self, config: uvicorn.Config, engine: AnswerEngine):
        super().__init__(config)
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let running answers end within `limits.drain_s`; at the second signal, end them at once."""
        is_second = self.should_exit
        self.should_exit = True
        if self._loop is not None:  # not here: the thread may hold a lock that the engine needs
            self._loop.call_soon_threadsafe(self._engine.stop if is_second else self._drain)

    def _drain(self) -> None:
        self._engine.drain()
        assert self._loop is not None
        self._loop.call_later(self._engine.limits.drain_s, self._engine.stop)


def _check_limits(limits: Limits) -> None:
    if limits.request_pixels < limits.picture_pixels:
        raise UserError(
            f"--max-request-megapixels={limits.request_pixels // 10**6} is below "
            f"--max-megapixels={limits.picture_pixels // 10**6} of one picture; raise it or lower the other"
        )
    if limits.held_bytes < limits.body_bytes:
        raise UserError(
            f"--max-held-mb={limits.held_bytes // 2**20} is below --max-body-mb={limits.body_bytes // 2**20} "
            "of one request; raise it or lower the other"
        )
    if limits.per_client > limits.waiting:
        raise UserError(
            f"--max-requests-per-client={limits.per_client} is above --max-requests={limits.waiting} of all "
            "clients; raise the latter or lower the former"
        )


def _listener(settings: ServerSettings) -> socket.socket:
    try:
        [first, *_] = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, address = first[0], first[4]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--host={settings.host} --port={settings.port}: {reason}; "
            "give another --host or --port (0 takes a free port)"
        ) from error
    return listener
