"""Estimates of the time, storage and memory that a stage takes: from its latest record, and of a training
also from the sizes of its model. For `vico plan`; a hint, never a limit.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.site import Site
from pipeline.config.graph import block_path
from pipeline.planning.request import OpenPipeline
from pipeline.planning.training_estimate import TrainingEstimate, size, training_estimate
from pipeline.results.attempt_metrics import metrics_of_attempts
from pipeline.results.records import Record
from pipeline.results.stage_folder import records_of
from pipeline.storage.lookup import storage_of
from pipeline.terminal.progress import duration
from stages.consistency.config import ConsistencyConfig

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
    training: TrainingEstimate | None = None
    """Of a consistency training: memory per rank, host memory and checkpoints, from config and site."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "training": self.training.as_json() if self.training else None}

    def lines(self) -> list[str]:
        """Return what `vico plan` shows: what was measured in an earlier run, then what was computed."""
        is_measured = (self.seconds, self.storage_bytes, self.memory_bytes) != (None, None, None)
        measured = [f"takes about {self}"] if is_measured else []
        return measured + (self.training.lines() if self.training else [])

    def __str__(self) -> str:
        words = [] if self.seconds is None else [duration(self.seconds)]
        words += [] if self.storage_bytes is None else [f"{size(self.storage_bytes)} stored"]
        words += [] if self.memory_bytes is None else [f"{size(self.memory_bytes)} memory"]
        return f"{', '.join(words)} ({self.source})"


def stage_estimates(opened: OpenPipeline, site: Site) -> dict[str, StageEstimate]:
    """Return stage -> estimate for the stages that would run, if anything is known about them."""
    estimates = {}
    for task in opened.pipeline.tasks:
        if task.name not in opened.stages_to_run or task.adopted_from is not None:
            continue
        records = records_of(site.storage, task.name)
        estimate = _from_record(records[-1], site) if records else StageEstimate(None, None, None, "")
        estimate = replace(estimate, training=_training(task.name, opened, site))
        if estimate.lines():
            estimates[task.name] = estimate
    return estimates


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


def _training(stage: str, opened: OpenPipeline, site: Site) -> TrainingEstimate | None:
    """Return the estimate of a consistency training, which trains all weights; None for another stage."""
    if block_path(stage)[-1] != "consistency":
        return None
    from stages.consistency.disk import most_checkpoints
    from vico.memory.model_sizes import model_sizes
    from vico.model_files import model_config

    config = next(task.config for task in opened.pipeline.tasks if task.name == stage)
    assert isinstance(config, ConsistencyConfig)
    sizes = model_sizes(model_config(opened.pipeline.config.inputs.model_folder))
    num_checkpoints = most_checkpoints(site.train.checkpoints.keep, remote=site.remote is not None)
    return training_estimate(config, sizes, site.for_stage(stage), num_checkpoints)
