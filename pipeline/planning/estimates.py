"""Estimates of the time, storage and memory that a stage takes: from its latest record with the same model,
and of a training also from the sizes of its model. For `vico plan`; a hint, never a limit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.config.graph import SOURCES, block_path
from pipeline.config.joint_checks import most_ranks
from pipeline.config.pipeline_file import PipelineConfig
from pipeline.planning.inference_estimate import InferenceEstimate, inference_estimate
from pipeline.planning.remedies import Limits
from pipeline.planning.request import OpenPipeline
from pipeline.planning.shard_contents import TrainSize, train_size
from pipeline.planning.training_estimate import TrainingEstimate, size, training_estimate
from pipeline.results.attempt_metrics import metrics_of_attempts
from pipeline.results.records import Record
from pipeline.results.stage_folder import StageFolder, records_of
from pipeline.storage.lookup import storage_of
from pipeline.terminal.progress import duration
from stages.consistency.config import ConsistencyConfig
from stages.shard.config import ShardConfig
from stages.stage_config import StageConfig
from vico.errors import UserError

_MEMORY = "system_memory_usage_megabytes"


@dataclass(frozen=True)
class StageEstimate:
    """What a stage is likely to take. None: not known."""

    seconds: float | None
    storage_bytes: int | None
    """Size of the output."""
    memory_bytes: int | None
    """Largest use of a node, all of its programs together."""
    source: str
    """Where the numbers come from."""
    inference: InferenceEstimate | None = None
    """Of ratio and evaluate on GPUs that never ran: samples and time, from config and site."""
    training: TrainingEstimate | None = None
    """Of a consistency training: memory per rank, host memory and checkpoints, from config and site."""

    @property
    def refusal(self) -> str | None:
        """Return why the stage is refused on this site; None if it is not."""
        return next((part.refusal for part in (self.training, self.inference) if part and part.refusal), None)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "training": self.training.as_json() if self.training else None}

    def lines(self) -> list[str]:
        """Return what `vico plan` shows: what was measured in an earlier run, then what was computed."""
        is_measured = (self.seconds, self.storage_bytes, self.memory_bytes) != (None, None, None)
        measured = [f"takes about {self}"] if is_measured else []
        inferred = self.inference.lines(measured=is_measured) if self.inference else []
        return [*measured, *inferred, *(self.training.lines() if self.training else [])]

    def __str__(self) -> str:
        words = [] if self.seconds is None else [duration(self.seconds)]
        words += [] if self.storage_bytes is None else [f"{size(self.storage_bytes)} stored"]
        words += [] if self.memory_bytes is None else [f"{size(self.memory_bytes)} memory"]
        return f"{', '.join(words)} ({self.source})"


def stage_estimates(opened: OpenPipeline, site: Site) -> dict[str, StageEstimate]:
    """Return stage -> estimate for the stages that would run, if anything is known about them."""
    estimates = {}
    train = _train_size(opened, site)
    for task in opened.pipeline.tasks:
        if task.name not in opened.stages_to_run or task.adopted_from is not None:
            continue
        model = opened.pipeline.sources.get("model")
        records = [
            record
            for record in records_of(site.storage, task.name)
            if _is_of_model(record, model, site.storage)
        ]
        estimate = _from_record(records[-1], site) if records else StageEstimate(None, None, None, "")
        estimate = replace(
            estimate,
            training=_training(task.name, opened, site, train),
            inference=_inference(task.name, task.config, opened, site),
        )
        if estimate.lines():
            estimates[task.name] = estimate
    return estimates


def _train_size(opened: OpenPipeline, site: Site) -> TrainSize | None:
    """Return the size of the train split if the shards are made and on this machine."""
    shard = next((task for task in opened.pipeline.tasks if task.name == "shard"), None)
    if shard is None or shard.name in opened.stages_to_run:
        return None
    return train_size(shard.folder(site.storage).output)


def _is_of_model(record: Record, model: str | None, storage: Path) -> bool:
    """Return whether a result was made from this start model, or from none: other models take other times.

    Not known, and so false, if the result of an earlier stage is gone.
    """
    inputs = record.identity.get("inputs", {})
    if "model" in inputs:
        return inputs["model"] == model
    stages = [(name, value) for name, value in inputs.items() if name not in SOURCES]
    try:
        earlier = [StageFolder(storage, name, fingerprint).record() for name, fingerprint in stages]
    except UserError:
        return False  # damaged; reported by commands that need this very record
    return all(result is not None and _is_of_model(result, model, storage) for result in earlier)


def _from_record(record: Record, site: Site) -> StageEstimate:
    folder = site.storage / record.stage / record.fingerprint
    storage_of(folder).refresh(folder)
    lines = metrics_of_attempts(folder / "attempts")
    used = [value for line in lines for name, value in line.metrics.items() if name.endswith(_MEMORY)]
    return StageEstimate(
        seconds=record.seconds,
        storage_bytes=sum(file.bytes for file in record.outputs.values()),
        memory_bytes=int(max(used) * 1e6) if used else None,
        source=f"as in run {record.run}",
    )


def _training(
    stage: str, opened: OpenPipeline, site: Site, train: TrainSize | None = None
) -> TrainingEstimate | None:
    """Return the estimate of a consistency training, which trains all weights; None for another stage."""
    from vico.model_files import model_config

    if block_path(stage)[-1] != "consistency":
        return None
    config = next(task.config for task in opened.pipeline.tasks if task.name == stage)
    limits = limits_of(opened.pipeline.config, site, stage)
    model = model_config(opened.pipeline.config.inputs.model_folder)
    return training_of(stage, config, model, site, limits, train)


def _inference(stage: str, config: StageConfig, opened: OpenPipeline, site: Site) -> InferenceEstimate | None:
    if block_path(stage)[-1] not in ("ratio", "evaluate"):
        return None
    from vico.model_files import model_config

    return inference_of(stage, config, model_config(opened.pipeline.config.inputs.model_folder), site)


def inference_of(
    stage: str, config: StageConfig, model: Mapping[str, Any], site: Site
) -> InferenceEstimate | None:
    """Return the estimate of ratio or evaluate on GPUs for the model with this config.json; None for another
    stage."""
    from vico.memory.model_sizes import model_sizes

    return inference_estimate(stage, config, model_sizes(model), site)


def limits_of(config: PipelineConfig, site: Site, stage: str) -> Limits:
    """Return what the other stages of a pipeline allow a training."""
    shard = dict(config.stage_configs()).get("shard")
    return Limits(
        most_ranks=most_ranks(config, site, stage),
        sample_tokens=shard.max_tokens if isinstance(shard, ShardConfig) else 0,
    )


def training_of(
    stage: str,
    config: StageConfig,
    model: Mapping[str, Any],
    site: Site,
    limits: Limits,
    train: TrainSize | None = None,
) -> TrainingEstimate | None:
    """Return the estimate of a consistency training of the model with this config.json (in Hugging Face
    form); None for a stage of another kind."""
    if not isinstance(config, ConsistencyConfig):
        return None
    from stages.consistency.disk import most_checkpoints
    from vico.memory.model_sizes import model_sizes

    num_checkpoints = most_checkpoints(site.train.checkpoints.keep, remote=site.remote is not None)
    return training_estimate(config, model_sizes(model), site, num_checkpoints, limits, stage, train)


def check_memory(opened: OpenPipeline, site: Site) -> None:
    """Raise UserError if a stage that would run does not fit the GPUs that the site states."""
    for task in opened.pipeline.tasks:
        if task.name in opened.stages_to_run and task.adopted_from is None:
            training = _training(task.name, opened, site)
            inference = _inference(task.name, task.config, opened, site)
            for refusal in (part.refusal for part in (training, inference) if part):
                if refusal:
                    raise UserError(refusal)
