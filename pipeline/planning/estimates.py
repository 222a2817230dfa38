"""Estimates of the time, storage and memory that a stage takes: from its latest record, or from the size of a
training that never ran. For `vico plan`; a hint, never a limit.
"""

from dataclasses import asdict, dataclass
from typing import Any

from cluster.site import Site
from pipeline.planning.request import OpenPipeline
from pipeline.results.attempt_metrics import metrics_of_attempts
from pipeline.results.records import Record
from pipeline.results.stage_folder import records_of
from pipeline.storage.lookup import storage_of
from pipeline.terminal.progress import duration
from stages.consistency.config import ConsistencyConfig
from vico.errors import UserError

_MEMORY = "system_memory_usage_megabytes"


@dataclass(frozen=True)
class StageEstimate:
    """What a stage is likely to take. None: not known."""

    seconds: float | None
    storage_bytes: int | None
    """Size of the output; before a first run, of checkpoints and model folders together."""
    memory_bytes: int | None
    """Largest use of a node, all of its programs together; before a first run, weights,
    reference and optimizer on all ranks together, without activations."""
    source: str
    """Where the numbers come from."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        words = [] if self.seconds is None else [duration(self.seconds)]
        words += [] if self.storage_bytes is None else [f"{_shown(self.storage_bytes)} stored"]
        words += [] if self.memory_bytes is None else [f"{_shown(self.memory_bytes)} memory"]
        return f"{', '.join(words)} ({self.source})"


def stage_estimates(opened: OpenPipeline, site: Site) -> dict[str, StageEstimate]:
    """Return stage -> estimate for the stages that would run, if anything is known about them."""
    estimates = {}
    for task in opened.pipeline.tasks:
        if task.name not in opened.stages_to_run or task.adopted_from is not None:
            continue
        records = records_of(site.storage, task.name)
        estimate = _from_record(records[-1], site) if records else _from_size(task.name, opened, site)
        if estimate is not None:
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


def _from_size(stage: str, opened: OpenPipeline, site: Site) -> StageEstimate | None:
    """Return an estimate for the consistency stage, which trains all weights; else None."""
    if stage != "consistency":
        return None
    from stages.consistency.disk import most_checkpoints, most_policies, training_bytes

    config = next(task.config for task in opened.pipeline.tasks if task.name == stage)
    assert isinstance(config, ConsistencyConfig)
    try:
        needed = training_bytes(config, opened.pipeline.config.inputs.model_folder)
    except UserError:
        return None  # the stage names the weight file that is damaged
    kept = site.train.checkpoints.keep
    num_checkpoints = most_checkpoints(kept, remote=site.remote is not None)
    return StageEstimate(
        seconds=None,
        storage_bytes=needed.checkpoint * num_checkpoints + needed.model * most_policies(config),
        memory_bytes=needed.checkpoint + needed.model,
        source=f"at most, from inputs.model and train.checkpoints.keep={kept}",
    )


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
