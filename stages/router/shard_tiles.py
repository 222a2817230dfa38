"""The labelled samples of one shard, and where their tiles are in the shard's file of vision features."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShardTiles:
    """The labelled train and calib samples of one shard: `rows` int64 [S], rising, and the tiles before each,
    `starts` int64 [S + 1]."""

    shard: int
    rows: np.ndarray
    starts: np.ndarray

    @property
    def num_tiles(self) -> int:
        return int(self.starts[-1])

    def span(self, row: int) -> tuple[int, int]:
        """Return the first tile of a sample and the one after its last, in the shard's feature file."""
        position = int(np.searchsorted(self.rows, row))
        return int(self.starts[position]), int(self.starts[position + 1])

    def batches(self, num_tiles: int) -> Iterator[list[int]]:
        """Yield the rows in runs of at least `num_tiles` tiles, the last one with what is left."""
        first = 0
        for end in range(1, len(self.rows) + 1):
            if end == len(self.rows) or self.starts[end] - self.starts[first] >= num_tiles:
                yield self.rows[first:end].tolist()
                first = end
