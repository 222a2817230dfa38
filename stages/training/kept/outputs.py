"""Read the kept values sample by sample."""

from collections.abc import Mapping, Sequence

import torch

from data_prep.shards.index import ShardIndex
from stages.training.kept.files import KeptFiles
from stages.training.kept.shard_rows import ShardRows


class KeptOutputs:
    """The values of the samples in `shards`, in files that all ranks read."""

    def __init__(
        self, files: KeptFiles, shards: Mapping[int, ShardRows], index: ShardIndex, shape: tuple[int, ...]
    ):
        """`shape` is that of one value: (P, v) for the features of a tile, (D,) for an answer token."""
        self.files, self.shards, self.shape = files, shards, shape
        self._index = index

    def of_rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the values of samples in order, [values, *shape]; `rows` are row numbers of the index."""
        parts = []
        for row in rows:
            shard = self._index.row(row, ("shard",))["shard"]
            span = self.shards[shard].span(row) if shard in self.shards else None
            if span is not None:
                parts.append(self.files.read(shard_file(shard), span))
        return torch.cat(parts) if parts else torch.zeros(0, *self.shape, dtype=self.files.dtype)

    def missing_shards(self) -> list[int]:
        """Return the shards whose file is not complete, the same list on every rank, which must all call it.

        Raises UserError if a file belongs to another maker.
        """
        missing = [[number for number in sorted(self.shards) if not self.files.has(shard_file(number))]]
        torch.distributed.broadcast_object_list(missing)
        return missing[0]


def shard_file(shard: int) -> str:
    """Return the name of the file with the values of a shard's samples."""
    return f"{shard:05d}"
