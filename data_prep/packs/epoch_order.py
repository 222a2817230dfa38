"""The order of an epoch before windows are shuffled: shards at random, each sample `repeat` times.

Used by `data_prep/packs/plan.py`.
"""

import numpy as np

from data_prep.draws import draw_order, draw_uniform
from data_prep.packs.column_files import ColumnFiles
from data_prep.shards.index import IndexColumns

_CHUNK_ROWS = 1 << 20


class EpochOrder:
    """Gives the sample and the copy number of each entry of the epoch.

    Copy c of a shard's samples is a unit. The units of all shards are shuffled together, so that the copies
    of a sample are spread over the epoch. A repeat of 2.3 gives two copies, and a third to a random 30 % of
    the rows. `shard_entries` int64 [C, K] counts the entries of copy c of shard k; passing it saves a pass
    over the samples.
    """

    def __init__(
        self,
        index: IndexColumns | ColumnFiles,
        seed: int,
        epoch: int,
        shard_entries: np.ndarray | None = None,
    ):
        self._index, self._seed, self._epoch = index, seed, epoch
        numbers, starts = index.shard_runs()
        if shard_entries is None:
            shard_entries = self._counted_entries(starts)
        self.shard_entries = shard_entries
        copies, shards = np.nonzero(shard_entries)
        order = draw_order("shard order", seed, epoch, numbers[shards], copies)
        self._unit_copies, shards = copies[order], shards[order]
        self._starts, self._ends = starts[shards], starts[shards + 1]
        self._entry_starts = np.r_[0, np.cumsum(shard_entries[self._unit_copies, shards])].astype(np.int64)

    @property
    def num_entries(self) -> int:
        """The number of samples of the epoch, with repeats."""
        return int(self._entry_starts[-1])

    def entries(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (positions in the columns, copy numbers) of entries first .. last - 1, int64 each."""
        none = np.zeros(0, np.int64)
        positions, copies = [none], [none]
        unit = int(np.searchsorted(self._entry_starts, first, side="right")) - 1
        while unit < len(self._starts) and self._entry_starts[unit] < last:
            start, end, copy = self._starts[unit], self._ends[unit], self._unit_copies[unit]
            members = start + np.flatnonzero(self._num_copies(start, end) > copy)
            before = int(self._entry_starts[unit])
            chosen = members[max(0, first - before) : last - before]
            positions.append(chosen)
            copies.append(np.full(len(chosen), copy))
            unit += 1
        return np.concatenate(positions), np.concatenate(copies)

    def _num_copies(self, start: int, end: int) -> np.ndarray:
        """Return how often each sample occurs, int64 [end - start].

        The fractional part of `repeat` is the share of rows that get one more copy, drawn by seed, epoch
        and row.
        """
        repeat = np.asarray(self._index.repeat[start:end])
        whole = np.floor(repeat)
        num_copies, share = whole.astype(np.int64), repeat - whole
        if share.any():
            drawn = draw_uniform("repeat share", self._seed, self._epoch, self._index.rows[start:end])
            num_copies += drawn < share
        return num_copies

    def _counted_entries(self, starts: np.ndarray) -> np.ndarray:
        """Return `shard_entries`, counted in a pass over the samples in chunks."""
        counts: list[np.ndarray] = []
        num_shards = len(starts) - 1
        for first in range(0, len(self._index), _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, len(self._index))
            num_copies = self._num_copies(first, last)
            shards = np.searchsorted(starts, np.arange(first, last), side="right") - 1
            for copy in range(int(num_copies.max(initial=0))):
                if copy == len(counts):
                    counts.append(np.zeros(num_shards, np.int64))
                counts[copy] += np.bincount(shards[num_copies > copy], minlength=num_shards)
        return np.stack(counts) if counts else np.zeros((0, num_shards), np.int64)
