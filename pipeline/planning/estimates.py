"""What a stage that would run is likely to take: time, storage and memory of an earlier run of the stage, or
what is known of a training before its first one. For `vico plan`; a hint, never a limit.
"""

from dataclasses import asdict, dataclass
from typing import Any

from cluster.site import Site
from pipeline.planning.request import OpenPipeline
from pipeline.progress import duration
from pipeline.results.metric_lines import MetricFiles
from pipeline.results.stage_folder import Record, records_of
from pipeline.storage.lookup import storage_of

_ALL_LINES = 1 << 30
_MEMORY = "system_memory_usage_megabytes"
_STATE_OVER_WEIGHTS = 16
"""Bytes of a training's state for a byte of weights, at most; what the stage itself asks of the disk."""


@dataclass(frozen=True)
class Expected:
    """`memory_bytes`: the most a node had in use, all of its programs together, or, before a first run,
    states of all ranks together without activations. `storage_bytes`: the output, or checkpoints on the
    way."""

    seconds: float | None
    storage_bytes: int | None
    memory_bytes: int | None
    source: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        words = [] if self.seconds is None else [duration(self.seconds)]
        words += [] if self.storage_bytes is None else [f"{_shown(self.storage_bytes)} stored"]
        words += [] if self.memory_bytes is None else [f"{_shown(self.memory_bytes)} memory"]
        return f"{', '.join(words)} ({self.source})"


def expectations(opened: OpenPipeline, site: Site) -> dict[str, Expected]:
    """By the name of each stage that would run and of which something is known."""
    running = {one.stage for one in opened.planned if one.action == "run"}
    found = {}
    for task in opened.pipeline.tasks:
        if task.name not in running or task.adopted_from is not None:
            continue
        records = records_of(site.storage, task.name)
        known = _of_record(records[-1], site) if records else _of_training(task.name, opened, site)
        if known is not None:
            found[task.name] = known
    return found


def _of_record(record: Record, site: Site) -> Expected:
    folder = site.storage / record.stage / record.fingerprint
    storage_of(folder).refresh(folder)
    lines = MetricFiles(folder / "attempts").unread(_ALL_LINES)
    used = [value for line in lines for name, value in line.metrics.items() if name.endswith(_MEMORY)]
    return Expected(
        seconds=record.seconds,
        storage_bytes=sum(file.bytes for file in record.outputs.values()),
        memory_bytes=int(max(used) * 1e6) if used else None,
        source=f"as in run {record.run}",
    )


def _of_training(stage: str, opened: OpenPipeline, site: Site) -> Expected | None:
    """The consistency training moves all weights; of other stages nothing is known before they ran."""
    if stage != "consistency":
        return None
    weights = sum(
        path.stat().st_size for path in opened.pipeline.config.inputs.model_folder.glob("*.safetensors")
    )
    states = _STATE_OVER_WEIGHTS * weights
    kept = site.train.keep_checkpoints
    return Expected(
        seconds=None,
        storage_bytes=states * (kept + 1),
        memory_bytes=states + weights,
        source=f"at most, from inputs.model and train.keep_checkpoints={kept}",
    )


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
