"""`vico serve`: a model behind an OpenAI-style chat endpoint, until SIGINT or SIGTERM.

The address is bound before the model is opened, so that a port in use is reported at once.
"""

import asyncio
import ipaddress
import logging
import math
import socket
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from pipeline.serving.answer import ServedModel
from pipeline.serving.app import Server
from pipeline.serving.engine import Engine
from pipeline.serving.http.access import OPEN, Access
from pipeline.serving.http.connections import LimitedConnection, OpenConnections
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.limits import Limits
from pipeline.serving.memory import memory_bound
from pipeline.serving.routing import Thresholds
from pipeline.serving.vllm.decoder import VllmDecoder
from pipeline.serving.vllm.process import VllmProcess, VllmSettings
from pipeline.terminal.output import TerminalHandler, error_terminal, terminal
from vico.checkpoints.hub import model_folder
from vico.errors import UserError
from vico.model_files import check_model_folder, model_config, stored_threshold

_GRACE_S = 3
"""How long clients may take to receive the end of their answers, after the last of them ended."""


@dataclass(frozen=True)
class VllmOptions:
    """The Python of vLLM's environment, further arguments of `vllm serve`, and the folder of the language
    model (None: beside the model, with the ending `.language`)."""

    python: str
    arguments: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class ServerSettings:
    """The address of the server, and the device and dtype of the model. Port 0: a free port.

    `proxies` are addresses whose X-Forwarded-For names the client.
    """

    host: str
    port: int
    device: str
    dtype: str
    access: Access = OPEN
    proxies: tuple[str, ...] = ()
    vllm: VllmOptions | None = None
    """None: the built-in engine."""


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
    threshold, and an address in use.
    """
    _check_limits(limits)
    logging.getLogger("pipeline").addHandler(TerminalHandler())
    listener = _listener(settings)
    with listener:
        model = model_folder(name_or_folder)
        metrics = Metrics()
        served = _served_model(model, settings, limits, threshold)
        served = replace(served, thresholds=replace(served.thresholds, rule=_rule(served, rule)))
        engine, decoder = _engine(served, model, settings, metrics)
        is_folder = Path(name_or_folder).is_dir()
        name = model.resolve().name if is_folder else name_or_folder
        config = _uvicorn_config(Server(engine, name, metrics, settings.access), settings, limits)
        _announce(name, listener, settings, memory_bound(served))
        try:
            _Stoppable(config, engine).run(sockets=[listener])
        finally:
            engine.stop()
            engine.join()
            if decoder is not None:
                decoder.close()


def _engine(
    served: ServedModel, model: Path, settings: ServerSettings, metrics: Metrics
) -> tuple[Engine, VllmDecoder | None]:
    """Return the engine, and the decoder to close after it if vLLM computes its steps."""
    options, limits = settings.vllm, served.limits
    if options is None:
        return Engine(served, metrics.step), None
    from vico.checkpoints.language_model import language_model_folder

    beside = model.absolute().with_name(f"{model.name}.language")
    folder = language_model_folder(model, options.folder or beside)
    process = VllmProcess(
        VllmSettings(
            options.python, folder, settings.dtype, limits.total_tokens, limits.batch, options.arguments
        )
    )
    served.model.drop_language_layers()
    end_of_turn_id = served.prompts.end_of_turn_id
    decoder = VllmDecoder(process, limits.decoded_tokens, limits.batch, end_of_turn_id)
    engine = Engine(served, metrics.step, decoder, lambda: process.is_ready)
    decoder.wake = engine.wake
    return engine, decoder


def _uvicorn_config(server: Server, settings: ServerSettings, limits: Limits) -> uvicorn.Config:
    connections = OpenConnections(limits, settings.proxies)
    return uvicorn.Config(
        server.app(),
        http=partial(LimitedConnection, connections),  # type: ignore[arg-type]  # it is called like a class
        ws="none",
        # uvicorn's own messages are about broken clients; the gate logs faults of the server
        log_level="critical",
        access_log=False,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.drain_s) + _GRACE_S,
        lifespan="off",
    )


def _announce(name: str, listener: socket.socket, settings: ServerSettings, memory: int) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    terminal().line(f"serving {name} at http://{shown}:{port}/v1")
    terminal().line(f"answering takes at most {memory // 2**20} MiB of memory beside the model")
    if not ipaddress.ip_address(host).is_loopback and not settings.access.keys:
        warning = "warning: no key is required; whoever reaches this address can use it; give --api-key-file"
        error_terminal().line(warning)


class _Stoppable(uvicorn.Server):
    """A server that also ends the running answers on a signal, and then exits with code 0."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
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


def _rule(served: ServedModel, rule: str | None) -> str | None:
    if rule not in (None, "full") and served.model.router is None:
        raise UserError(f"--rule={rule}: this model has no router; leave it out, or give --rule full")
    return rule


def _served_model(
    model: Path, settings: ServerSettings, limits: Limits, threshold: float | None
) -> ServedModel:
    import torch

    from vico.checkpoints import load_model
    from vico.prompt import load_prompt_format

    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device={settings.device}: torch sees no CUDA device here; give --device cpu")
    check_model_folder(model)
    config = model_config(model)
    prompts = load_prompt_format(model)
    own_limit = int(config["text_config"].get("max_position_embeddings", 32768))
    if limits.total_tokens > own_limit:
        raise UserError(f"--max-total-tokens={limits.total_tokens} is above the model's own {own_limit}")
    limits = replace(limits, total_tokens=limits.total_tokens or own_limit)
    if limits.decoded_tokens < limits.total_tokens:
        raise UserError(
            f"--cache-tokens={limits.cache_tokens} is below the {limits.total_tokens} tokens that one "
            "request may have (--max-total-tokens); raise it or lower the other"
        )
    routed = load_model(model, getattr(torch, settings.dtype), settings.device)
    if routed.router is None and threshold is not None:
        raise UserError(f"--threshold={threshold}: {model} has no router; leave it out")
    if routed.router is not None and threshold is None:
        threshold = stored_threshold(model)
    relative = float(config.get("vico", {}).get("relative_threshold", 0.0))
    return ServedModel(routed, prompts, limits, Thresholds(threshold, relative))
