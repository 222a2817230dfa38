"""Whether a training fits the GPUs of its site, and which settings would make it fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.site import Site
from stages.consistency.config import ConsistencyConfig
from vico.memory.model_sizes import ModelSizes
from vico.memory.training_memory import RankMemory, TrainingShape, rank_memory

USABLE = 0.9
"""Share of a GPU's memory for what is computed here; the rest is for CUDA, NCCL and fragments."""
_MOST_RANKS = 512
_SMALLEST_PACK = 4096
_LADDER: tuple[Mapping[str, Any], ...] = (
    {},
    {"checkpointing": "selective"},
    {"checkpointing": "full"},
    {"zero_stage": 2},
    {"zero_stage": 2, "checkpointing": "full"},
    {"zero_stage": 3, "reference": "sharded"},
    {"zero_stage": 3, "reference": "sharded", "checkpointing": "selective"},
    {"zero_stage": 3, "reference": "sharded", "checkpointing": "full"},
    {"zero_stage": 3, "reference": "sharded", "checkpointing": "full", "offload": "optimizer"},
)
"""Settings of the site to try, those that cost least time first."""
_FIELDS = {
    "checkpointing": "train.memory.activation_checkpointing",
    "zero_stage": "train.memory.zero_stage",
    "reference": "train.memory.reference",
    "offload": "train.memory.offload",
    "num_ranks": "resources.workers",
}
_RECOMPUTES = {"none": 0, "selective": 1, "full": 2}


@dataclass(frozen=True)
class Fit:
    """A training that was compared with the memory of a GPU."""

    memory: RankMemory
    usable_bytes: float | None
    """None: the site does not state the memory of its GPUs."""
    remedy: str | None
    """The settings that would make it fit, with the memory then; None: it fits, or nothing would."""

    @property
    def fits(self) -> bool:
        return self.usable_bytes is None or self.memory.device <= self.usable_bytes

    def refusal(self, stage: str, field: str) -> str | None:
        """Return why the stage is refused; None if it fits. `field` is the site's field of the memory."""
        if self.fits or self.usable_bytes is None:
            return None
        gpu = self.usable_bytes / USABLE / 1e9
        remedy = self.remedy or "no setting would make it fit; take GPUs with more memory"
        return (
            f"{stage} needs about {self.memory.device / 1e9:.1f} GB of GPU memory per rank at a full pack, "
            f"and {field}={gpu:g} leaves {self.usable_bytes / 1e9:.1f} GB; {remedy}"
        )


def compared(
    config: ConsistencyConfig, sizes: ModelSizes, site: Site, shape: TrainingShape, block: str
) -> Fit:
    """Return how a training of this shape fits the GPUs of `site`, the site as its stage sees it."""
    memory, gpu_gb = rank_memory(sizes, shape), site.resources.gpu_memory_gb
    if gpu_gb is None or not site.resources.gpus_per_worker:
        return Fit(memory, None, None)
    usable = USABLE * gpu_gb * 1e9
    fitting = None
    if memory.device > usable:
        candidates = _changes(shape, config.packs_per_step)
        measured = ((names, rank_memory(sizes, changed)) for names, changed in candidates)
        fitting = next(((names, other) for names, other in measured if other.device <= usable), None)
    return Fit(memory, usable, fitting and _remedy(*fitting, shape, config, block))


Change = Mapping[str, object]


def _changes(shape: TrainingShape, most_ranks: int) -> Iterator[tuple[Change, TrainingShape]]:
    """Yield changes and the shape with them: settings of the site first, then more ranks, smaller packs."""
    yield from _steps(shape, {})
    ranks = shape.num_ranks * 2
    while ranks <= min(_MOST_RANKS, most_ranks):
        yield from _steps(replace(shape, num_ranks=ranks), {"num_ranks": ranks})
        ranks *= 2
    parts = 2
    while shape.tokens // parts >= _SMALLEST_PACK // 2 and shape.tiles // parts:
        smaller = replace(shape, tokens=shape.tokens // parts, tiles=shape.tiles // parts)
        yield from _steps(smaller, {"parts": parts})
        parts *= 2


def _steps(shape: TrainingShape, before: Change) -> Iterator[tuple[Change, TrainingShape]]:
    for step in _LADDER:
        changed = replace(shape, **step)
        is_less = changed.zero_stage < shape.zero_stage
        is_less |= _RECOMPUTES[changed.checkpointing] < _RECOMPUTES[shape.checkpointing]
        if not is_less and shape.offload in ("none", changed.offload):
            changes = {name: value for name, value in step.items() if getattr(shape, name) != value}
            if changes or before:
                yield {**before, **changes}, changed


def _remedy(
    changes: Change, memory: RankMemory, shape: TrainingShape, config: ConsistencyConfig, block: str
) -> str:
    settings = [f"{_FIELDS[name]}: {value}" for name, value in changes.items() if name in _FIELDS]
    parts = changes.get("parts")
    if isinstance(parts, int):
        settings += [
            f"{block}.tiles_per_pack: {shape.tiles // parts}",
            f"{block}.reference_tokens_per_pack: {config.reference_tokens_per_pack // parts}",
            f"{block}.packs_per_step: {config.packs_per_step * parts} for the same update",
        ]
    return f"set {', '.join(settings)} (about {memory.device / 1e9:.1f} GB then)"
