"""What a consistency training will need, before it ever ran: memory per rank, host memory, checkpoints, and
its speed."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from cluster.site import Site
from pipeline.config.graph import block_path
from pipeline.planning.fitting import compared
from pipeline.planning.remedies import Limits, Training
from pipeline.planning.shard_contents import TrainSize
from pipeline.planning.training_shape import training_shape
from pipeline.terminal.progress import duration
from stages.consistency.config import ConsistencyConfig
from stages.consistency.disk import most_policies
from stages.consistency.rate_rule import rate_warning
from vico.memory.model_sizes import ModelSizes
from vico.memory.speed import PackWork, pack_seconds
from vico.memory.training_memory import RankMemory, TrainingShape, checkpoint_bytes


@dataclass(frozen=True)
class TrainingEstimate:
    """The memory of a rank at a full pack, and the bytes of checkpoints and model folders.

    `on_gpus`: the ranks have GPUs; without, device memory is host memory.
    """

    memory: RankMemory
    num_ranks: int
    on_gpus: bool
    checkpoint: int
    num_checkpoints: int
    model: int
    num_models: int
    tokens_per_second: float | None
    """Of all ranks, both rows; None: the site does not state the peak of its GPUs."""
    refusal: str | None
    """Why the stage is refused, with a remedy; None if it fits, or if the site does not state the memory of
    its GPUs."""
    num_updates: int | None = None
    """None: not known before the shards are made."""
    seconds: float | None = None
    """Time of the updates at that speed; None if speed or number is not known."""
    warning: str | None = None
    """About a learning rate that is far above what belongs to the size of an update."""

    @property
    def disk(self) -> int:
        """All checkpoints and model folders that exist at the same time."""
        return self.checkpoint * self.num_checkpoints + self.model * self.num_models

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "device_bytes": self.memory.device, "disk_bytes": self.disk}

    def _speed_lines(self) -> list[str]:
        if not self.on_gpus:
            return []
        if self.tokens_per_second is None:
            return ["speed: unknown; train.profiling.peak_tflops of the site gives an estimate"]
        per_rank = self.tokens_per_second / self.num_ranks
        time = "time: known once the shards are made (`vico data build`)"
        if self.seconds is not None:
            time = f"time: about {duration(self.seconds)} for {self.num_updates:,} updates at that speed"
        return [
            f"speed: about {self.tokens_per_second:,.0f} tokens per second, {per_rank:,.0f} per rank "
            "(computed, with the efficiency measured at 1B)",
            time,
        ]

    def lines(self) -> list[str]:
        """Return the estimate for `vico plan`: one line per resource."""
        memory = self.memory
        models = f"the policy, {size(self.model)}"
        if self.num_models > 1:  # select: best
            models = f"{self.num_models} policies of {size(self.model)}"
        where = "GPU memory" if self.on_gpus else "host memory"
        activations = memory.vision_activations + memory.language_activations
        parts = {
            "activations": activations,
            "weights": memory.weights,
            "reference": memory.reference,
            "optimizer": memory.optimizer,
            "gradients": memory.gradients,
            "loss": memory.loss,
            "buffers": memory.buffers,
        }
        shown = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
        return [
            f"memory: about {size(memory.device)} of {where} per rank at a full pack ({shown})",
            f"host memory in addition: {size(memory.host)} per rank, "
            f"{size(memory.host * self.num_ranks)} in all",
            f"disk: {self.num_checkpoints} checkpoints of {size(self.checkpoint)} at a time, and {models}",
            *self._speed_lines(),
            *([f"warning: {self.warning}"] if self.warning else []),
            *([f"refused: {self.refusal}"] if self.refusal else []),
        ]


def training_estimate(
    config: ConsistencyConfig,
    sizes: ModelSizes,
    site: Site,
    num_checkpoints: int,
    limits: Limits,
    stage: str = "consistency",
    train: TrainSize | None = None,
) -> TrainingEstimate:
    """Return the estimate of a training on `site`, whose resources are those of all stages.

    `train` is the size of the train split; None before the shards are made.
    """
    of_stage, block = site.for_stage(stage), ".".join(block_path(stage))
    weight_bytes = 4 if config.optimizer.dtype == "float32" else 2
    shape = training_shape(config, sizes, of_stage)
    ranks_field = site.resources.field_of(stage, "workers")
    fit = compared(Training(config, sizes, of_stage, limits, block, ranks_field), shape)
    speed, num_updates = _pack_speed(config, sizes, of_stage, shape), _num_updates(config, sizes, train)
    seconds = None
    if speed is not None and num_updates is not None:
        seconds = num_updates * math.ceil(config.packs_per_step / shape.num_ranks) * speed.pack_seconds
    return TrainingEstimate(
        memory=fit.memory,
        num_ranks=shape.num_ranks,
        on_gpus=of_stage.resources.gpus_per_worker > 0,
        checkpoint=checkpoint_bytes(sizes, weight_bytes, train_vision=config.train_vision),
        num_checkpoints=num_checkpoints,
        model=weight_bytes * sizes.policy,
        num_models=most_policies(config),
        tokens_per_second=None if speed is None else shape.num_ranks * speed.tokens / speed.pack_seconds,
        num_updates=num_updates,
        seconds=seconds,
        refusal=fit.refusal(stage, site.resources.field_of(stage, "gpu_memory_gb")),
        warning=rate_warning(config, sizes.base, block),
    )


def _num_updates(config: ConsistencyConfig, sizes: ModelSizes, train: TrainSize | None) -> int | None:
    """Return the updates of the training if its packs are full; None if the data are not known."""
    if train is None:
        return None
    tokens = train.text_tokens + train.tiles * sizes.full_tokens
    packs = max(tokens / config.reference_tokens_per_pack, train.tiles / config.tiles_per_pack)
    updates = max(1, math.ceil(config.epochs * packs / config.packs_per_step))
    return min(updates, config.max_steps) if config.max_steps else updates


@dataclass(frozen=True)
class _PackSpeed:
    tokens: int
    pack_seconds: float


def _pack_speed(
    config: ConsistencyConfig, sizes: ModelSizes, site: Site, shape: TrainingShape
) -> _PackSpeed | None:
    """Return tokens and time of a full pack on one rank; None if the peak of the GPUs is not known."""
    peak = site.train.profiling.peak_tflops
    if peak is None or not site.resources.gpus_per_worker:
        return None
    work = PackWork(
        tiles=shape.tiles,
        policy_tokens=shape.tokens,
        reference_tokens=config.reference_tokens_per_pack,
        train_vision=config.train_vision,
        checkpointing=shape.checkpointing,
    )
    return _PackSpeed(work.tokens, pack_seconds(sizes, work, peak, compiled=site.train.compile))


def size(num_bytes: float) -> str:
    """Return a size as people write it: `61.2 GB`, `30.9 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
