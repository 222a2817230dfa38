"""On how many GPUs, and with which settings, a model can be trained: for `vico init` and docs/models.md."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.settings.blocks import RaySettings
from pipeline.planning.fitting import USABLE
from vico.memory.model_sizes import ModelSizes
from vico.memory.training_memory import RankMemory, TrainingShape, rank_memory

GPU_BYTES = 80 * 10**9
_GPUS_OF_A_MACHINE = 8
_RANKS = (1, 2, 4, 8, 16, 32, 64)
MOST_GPUS = _RANKS[-1]
PACKS = ((96, 32768), (48, 16384), (24, 8192), (12, 4096))
"""(tiles, tokens at the full rate) of a pack, the stage's defaults first."""


@dataclass(frozen=True)
class Setup:
    """GPUs and settings with which a training fits, all in bfloat16."""

    num_gpus: int
    zero_stage: int
    checkpointing: Literal["none", "selective", "full"]
    reference: str
    tiles_per_pack: int
    tokens_per_pack: int
    memory: RankMemory

    def site(self) -> list[str]:
        """Return the lines of a site file: one machine with these GPUs, or a Ray cluster of several."""
        count = self.num_gpus
        memory = f"zero_stage: {self.zero_stage}, activation_checkpointing: {self.checkpointing}"
        memory += "" if self.reference == "replicated" else f", reference: {self.reference}"
        ray = f"ray: {{num_cpus: {count}}}"
        if count > _GPUS_OF_A_MACHINE:
            ray = "ray: {address: auto}   # several machines: run the command on a node of their Ray cluster"
        return [
            *([ray] if count > RaySettings().num_cpus else []),
            f"resources: {{workers: {count}, actors: {count}, gpus_per_worker: 1}}",
            f"train: {{memory: {{{memory}}}}}",
        ]


def smallest_setup(sizes: ModelSizes, gpu_bytes: int = GPU_BYTES) -> Setup | None:
    """Return the setup with the fewest GPUs; with as many, the one that recomputes and moves least."""
    for ranks in _RANKS:
        for tiles, tokens in PACKS:
            fitting = (setup for setup in _setups(sizes, ranks, tiles, tokens) if _fits(setup, gpu_bytes))
            setup = next(fitting, None)
            if setup is not None:
                return setup
    return None


def _fits(setup: Setup, gpu_bytes: int) -> bool:
    return setup.memory.device <= USABLE * gpu_bytes


def _setups(sizes: ModelSizes, ranks: int, tiles: int, tokens: int) -> Iterator[Setup]:
    """Yield the settings for a pack, those that cost least time first."""
    visual = min(tiles, tokens // sizes.full_tokens) * sizes.full_tokens
    choices: tuple[tuple[int, Literal["none", "selective", "full"], str], ...] = (
        (2, "none", "replicated"),
        (2, "selective", "replicated"),
        (2, "full", "replicated"),
        (3, "full", "sharded"),
    )
    for zero_stage, checkpointing, reference in choices:
        shape = TrainingShape(
            tokens=round(tokens - 0.375 * visual),  # half of the tiles at a quarter of the tokens
            tiles=tiles,
            num_ranks=ranks,
            weight_bytes=2,
            zero_stage=zero_stage,
            offload="none",
            reference=reference,
            checkpointing=checkpointing,
            train_vision=True,
            kl_chunk_rows=1024,
        )
        memory = rank_memory(sizes, shape)
        yield Setup(ranks, zero_stage, checkpointing, reference, tiles, tokens, memory)
