"""Open the model that a server answers with, and run an engine over it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.serving.answer import ServedModel
from pipeline.serving.engine import Engine
from pipeline.serving.limits import Limits
from pipeline.serving.routing import Thresholds
from pipeline.serving.start.settings import ServerSettings
from pipeline.serving.vllm.decoder import VllmDecoder
from pipeline.serving.vllm.process import VllmProcess, VllmSettings
from vico.checkpoints import load_model, open_unread
from vico.checkpoints.hub import model_folder
from vico.errors import UserError
from vico.model_files import check_model_folder, model_config, stored_threshold
from vico.prompt import load_prompt_format


@dataclass(frozen=True)
class Answering:
    """What to answer with: the model's folder, and what the command line says about limits and routing.

    `threshold` and `rule` None are the model's own. `hub_id` is that of a model from the Hub, with its
    commit: on another machine its folder may be elsewhere.
    """

    folder: Path
    limits: Limits
    threshold: float | None = None
    rule: str | None = None
    hub_id: str | None = None

    def here(self) -> "Answering":
        """Return it with the folder on this machine; a model from the Hub is fetched if it is not there."""
        return self if self.hub_id is None else replace(self, folder=model_folder(self.hub_id))

    def opened(self, settings: ServerSettings, *, weights: bool = True) -> ServedModel:
        """Open the model. `weights` false: its parameters are not read, so it can only make prompts.

        Raises UserError for a model that cannot be opened, limits above the model's own, a router without a
        threshold, and a rule or threshold for a model without a router.
        """
        if weights and settings.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device={settings.device}: torch sees no CUDA device here; give --device cpu")
        check_model_folder(self.folder)
        config = model_config(self.folder)
        limits = self._limits(config)
        prompts, dtype = load_prompt_format(self.folder), getattr(torch, settings.dtype)
        model = (
            load_model(self.folder, dtype, settings.device) if weights else open_unread(self.folder, dtype)
        )
        threshold = self.threshold
        if model.router is None and threshold is not None:
            raise UserError(f"--threshold={threshold}: {self.folder} has no router; leave it out")
        if model.router is None and self.rule not in (None, "full"):
            raise UserError(
                f"--rule={self.rule}: this model has no router; leave it out, or give --rule full"
            )
        if model.router is not None and threshold is None:
            threshold = stored_threshold(self.folder)
        relative = float(config.get("vico", {}).get("relative_threshold", 0.0))
        return ServedModel(model, prompts, limits, Thresholds(threshold, relative, self.rule))

    def _limits(self, config: Any) -> Limits:
        own_limit = int(config["text_config"].get("max_position_embeddings", 32768))
        if self.limits.total_tokens > own_limit:
            raise UserError(
                f"--max-total-tokens={self.limits.total_tokens} is above the model's own {own_limit}"
            )
        limits = replace(self.limits, total_tokens=self.limits.total_tokens or own_limit)
        if limits.decoded_tokens < limits.total_tokens:
            raise UserError(
                f"--cache-tokens={limits.cache_tokens} is below the {limits.total_tokens} tokens that one "
                "request may have (--max-total-tokens); raise it or lower the other"
            )
        return limits


@contextmanager
def running_engine(
    served: ServedModel,
    folder: Path,
    settings: ServerSettings,
    on_step: Callable[[float, int], object] = lambda *_: None,
) -> Iterator[Engine]:
    """Run an engine in this process until the end of the block, with vLLM if the settings say so."""
    engine, decoder = _engine(served, folder, settings, on_step)
    try:
        yield engine
    finally:
        engine.stop()
        engine.join()
        if decoder is not None:
            decoder.close()


def _engine(
    served: ServedModel, folder: Path, settings: ServerSettings, on_step: Callable[[float, int], object]
) -> tuple[Engine, VllmDecoder | None]:
    """Return the engine, and the decoder to close after it if vLLM computes its steps."""
    options, limits = settings.vllm, served.limits
    if options is None:
        return Engine(served, on_step), None
    language = language_folder(folder, settings)
    log = None
    if settings.replicas is not None:  # several on one machine
        log = language.with_name(f"{language.name}-{os.getpid()}.log")
    process = VllmProcess(
        VllmSettings(
            options.python,
            language,
            settings.dtype,
            limits.total_tokens,
            limits.batch,
            options.arguments,
            log,
        )
    )
    served.model.drop_language_layers()
    end_of_turn_id = served.prompts.end_of_turn_id
    decoder = VllmDecoder(process, limits.decoded_tokens, limits.batch, end_of_turn_id)
    engine = Engine(served, on_step, decoder, lambda: process.is_ready)
    decoder.wake = engine.wake
    return engine, decoder


def language_folder(folder: Path, settings: ServerSettings) -> Path:
    """Return the folder of the language model for vLLM; it is written if it is not there."""
    from vico.checkpoints.language_model import language_model_folder

    assert settings.vllm is not None
    beside = folder.absolute().with_name(f"{folder.name}.language")
    return language_model_folder(folder, settings.vllm.folder or beside)
