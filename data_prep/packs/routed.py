"""The rates that a router chose for tiles, read from files by shard, for the plan of a training.

A file is named after its shard and has one row per tile, in index order: `row` of the sample in the index,
`p_compress` float32, the router's probability to compress. A tile is compressed if it is at least the
threshold.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_prep.shards.index import IndexColumns
from vico.errors import UserError

_OPEN_SHARDS = 64


class RoutedTiles:
    """The router's decisions; `folder` has the files, as in `parts/` of the stage that routed the tiles."""

    def __init__(self, folder: Path, threshold: float):
        self._folder, self.threshold = folder, threshold
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._read)

    def compressed(self, samples: IndexColumns) -> np.ndarray:
        """Return whether the router compresses each tile of the samples, bool [T] over all tiles.

        Raises UserError for a sample whose tiles the router has not seen.
        """
        ends = np.cumsum(samples.num_tiles, dtype=np.int64)
        compressed = np.zeros(int(ends[-1]) if len(ends) else 0, bool)
        for shard in np.unique(samples.shard[samples.num_tiles > 0]).tolist():
            positions = np.flatnonzero((samples.shard == shard) & (samples.num_tiles > 0))
            rows, decisions = self._shard(shard)
            counts = samples.num_tiles[positions].astype(np.int64)
            first = np.searchsorted(rows, samples.rows[positions])
            num_known = np.searchsorted(rows, samples.rows[positions], side="right") - first
            if not np.array_equal(num_known, counts):
                wrong = int(np.flatnonzero(num_known != counts)[0])
                raise UserError(
                    f"{self._path(shard)} has {num_known[wrong]} of the {counts[wrong]} tiles of "
                    f"{samples.name(int(positions[wrong]))}; its rates are of other shards: leave out "
                    "inputs.adopt.joint_rates"
                )
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            target = np.repeat(ends[positions] - counts, counts) + within
            compressed[target] = decisions[np.repeat(first, counts) + within]
        return compressed

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:05d}.parquet"

    def _read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row and decision of each tile of a shard, int64 [N], rising, and bool [N]."""
        path = self._path(shard)
        if not path.is_file():
            return np.zeros(0, np.int64), np.zeros(0, bool)
        table = pq.read_table(path, columns=["row", "p_compress"])
        return table["row"].to_numpy(), table["p_compress"].to_numpy() >= np.float32(self.threshold)
