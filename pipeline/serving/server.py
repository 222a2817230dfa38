"""`vico serve`: a model behind an OpenAI-style chat endpoint, until SIGINT or SIGTERM.

The address is bound before the model is opened, so that a port in use is reported at once.
"""

import ipaddress
import logging
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import typer
import uvicorn

from pipeline.serving.answer import ServedModel
from pipeline.serving.app import Server
from pipeline.serving.engine import Engine
from pipeline.serving.limits import Limits
from pipeline.serving.routing import Thresholds
from vico.checkpoints.hub import model_folder
from vico.errors import UserError
from vico.model_files import check_model_folder, model_config, stored_threshold

_GRACE_S = 5
"""How long running answers may take to end after a signal."""


@dataclass(frozen=True)
class ServerSettings:
    """The address of the server, and the device and dtype of the model. Port 0: a free port."""

    host: str
    port: int
    device: str
    dtype: str


def serve(
    name_or_folder: str, settings: ServerSettings, limits: Limits, threshold: float | None = None
) -> None:
    """Serve a model folder or Hub id until a signal comes. `limits.total_tokens` 0 means the model's own
    limit.

    Raises UserError for limits that contradict each other, a model that cannot be opened, a router without a
    threshold, and an address in use.
    """
    _check_limits(limits)
    logging.getLogger("pipeline").addHandler(logging.StreamHandler(sys.stderr))
    listener = _listener(settings)
    with listener:
        model = model_folder(name_or_folder)
        engine = Engine(_served_model(model, settings, limits, threshold))
        is_folder = Path(name_or_folder).is_dir()
        name = model.resolve().name if is_folder else name_or_folder
        config = uvicorn.Config(
            Server(engine, name).app(),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
            lifespan="off",
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"serving {name} at http://{shown}:{port}/v1")
        if not ipaddress.ip_address(host).is_loopback:
            typer.echo("warning: no key is required; whoever reaches this address can use it", err=True)
        try:
            _Stoppable(config, engine).run(sockets=[listener])
        finally:
            engine.stop()
            engine.join()


class _Stoppable(uvicorn.Server):
    """A server that also ends the running answers on a signal, and then exits with code 0."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._engine.stop()


def _check_limits(limits: Limits) -> None:
    if limits.request_pixels < limits.picture_pixels:
        raise UserError(
            f"--max-request-megapixels={limits.request_pixels // 10**6} is below "
            f"--max-megapixels={limits.picture_pixels // 10**6} of one picture; raise it or lower the other"
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
    routed = load_model(model, getattr(torch, settings.dtype), settings.device)
    if routed.router is None and threshold is not None:
        raise UserError(f"--threshold={threshold}: {model} has no router; leave it out")
    if routed.router is not None and threshold is None:
        threshold = stored_threshold(model)
    relative = float(config.get("vico", {}).get("relative_threshold", 0.0))
    return ServedModel(routed, prompts, limits, Thresholds(threshold, relative))
