"""The samples of one shard, and where their values are in the shard's file."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShardRows:
    """Samples of one shard: `rows` int64 [S], rising, and the values (tiles, answer tokens) before each,
    `starts` int64 [S + 1]."""

    shard: int
    rows: np.ndarray
    starts: np.ndarray

    @property
    def num_values(self) -> int:
        return int(self.starts[-1])

    def span(self, row: int) -> slice | None:
        """Return where the values of a sample are; None if it has none."""
        position = int(np.searchsorted(self.rows, row))
        if position == len(self.rows) or self.rows[position] != row:
            return None
        return slice(int(self.starts[position]), int(self.starts[position + 1]))

    def batches(self, num_values: int) -> Iterator[list[int]]:
        """Yield the rows in runs of at least `num_values` values, the last one with what is left."""
        first = 0
        for end in range(1, len(self.rows) + 1):
            if end == len(self.rows) or self.starts[end] - self.starts[first] >= num_values:
                yield self.rows[first:end].tolist()
                first = end


def rows_by_shard(rows: np.ndarray, shards: np.ndarray, counts: np.ndarray) -> dict[int, ShardRows]:
    """Return the samples by shard, without those that have no values.

    `rows`, `shards` and `counts`, each [S], are row numbers of the index, shards and numbers of values.
    """
    order = np.argsort(rows)
    order = order[counts[order] > 0]
    rows, shards, counts = rows[order], shards[order], counts[order]
    return {
        shard: ShardRows(
            shard, rows[shards == shard], np.concatenate([[0], np.cumsum(counts[shards == shard])])
        )
        for shard in np.unique(shards).tolist()
    }
