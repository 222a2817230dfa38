"""Compute the vision features of a training's tiles on all ranks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from stages.training.kept.outputs import KeptOutputs, shard_file
from stages.training.kept.shard_rows import ShardRows
from stages.training.ranks.phases import phase_items
from stages.training.step import share_of_rank
from vico.checkpoints import open_unread
from vico.model.internvl import VicoModel
from vico.model.unread import read_all


def open_tower(folder: Path, dtype: torch.dtype) -> VicoModel:
    """Return the model of a folder, of which only the vision tower is read. It is frozen, and on this rank's
    device."""
    model = open_unread(folder, dtype).requires_grad_(False)
    tower = model.base.model.vision_tower
    read_all(tower.parameters())
    tower.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def compute_features(
    kept: KeptOutputs,
    model: VicoModel,
    pixels: Callable[[Sequence[int]], torch.Tensor],
    batch_tiles: int,
    attempt_folder: Path,
) -> None:
    """Compute the features that are missing. Every rank must call it; each writes its share of the shards.
    Raises Preempted after a stop notice, between two shards.

    `pixels` returns the tiles of samples, by their rows in the index. The tiles that go through the tower
    together depend on the shard alone, so a file that is written again is the same.
    """
    device = next(model.base.model.vision_tower.parameters()).device

    @torch.no_grad()
    def of_shard(shard: ShardRows) -> Iterator[torch.Tensor]:
        for rows in shard.batches(batch_tiles):
            yield model.vision_features(pixels(rows).to(device))

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    missing = [kept.shards[number] for number in kept.missing_shards()]
    own = share_of_rank(missing, rank, world_size)
    unit = "shards of vision features"
    for _, shard in phase_items(own, len(missing), unit, attempt_folder, may_stop=True):
        if shard is not None:
            kept.files.write(shard_file(shard.shard), shard.num_values, partial(of_shard, shard))
    torch.distributed.barrier()
