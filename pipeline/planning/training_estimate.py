"""What a consistency training will need, before it ever ran: memory per rank, host memory, checkpoints."""

from dataclasses import asdict, dataclass
from typing import Any

from cluster.site import Site
from stages.consistency.config import ConsistencyConfig
from vico.memory.model_sizes import ModelSizes
from vico.memory.training_memory import RankMemory, TrainingShape, checkpoint_bytes, rank_memory


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

    @property
    def disk(self) -> int:
        """All checkpoints that exist at the same time, and the policy."""
        return self.checkpoint * self.num_checkpoints + self.model

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "device_bytes": self.memory.device, "disk_bytes": self.disk}

    def lines(self) -> list[str]:
        """Return the estimate for `vico plan`: one line per resource."""
        memory = self.memory
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
            f"disk: {self.num_checkpoints} checkpoints of {size(self.checkpoint)} at a time, and the policy, "
            f"{size(self.model)}",
        ]


def training_estimate(
    config: ConsistencyConfig, sizes: ModelSizes, site: Site, num_checkpoints: int
) -> TrainingEstimate:
    """Return the estimate of a training with the resources of `site`, the site as its stage sees it."""
    memory, resources = site.train.memory, site.resources
    weight_bytes = 4 if config.optimizer.dtype == "float32" else 2
    shape = TrainingShape(
        tokens=pack_tokens(config, sizes),
        tiles=config.tiles_per_pack,
        num_ranks=resources.workers,
        weight_bytes=weight_bytes,
        zero_stage=memory.zero_stage,
        offload=memory.offload,
        reference=memory.reference,
        checkpointing=memory.activation_checkpointing,
        train_vision=config.train_vision,
        kl_chunk_rows=memory.kl_chunk_rows,
    )
    return TrainingEstimate(
        memory=rank_memory(sizes, shape),
        num_ranks=resources.workers,
        on_gpus=resources.gpus_per_worker > 0,
        checkpoint=checkpoint_bytes(sizes, weight_bytes, train_vision=config.train_vision),
        num_checkpoints=num_checkpoints,
        model=weight_bytes * sizes.policy,
    )


def pack_tokens(config: ConsistencyConfig, sizes: ModelSizes) -> int:
    """Return the policy's tokens in a full pack: its budget less what the drawn rates save of the tiles."""
    tiles = min(config.tiles_per_pack, config.reference_tokens_per_pack // sizes.full_tokens)
    saved = config.compress_share * 0.75 * sizes.full_tokens * tiles
    return round(config.reference_tokens_per_pack - saved)


def size(num_bytes: float) -> str:
    """Return a size as people write it: `61.2 GB`, `30.9 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
