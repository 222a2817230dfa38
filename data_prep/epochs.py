"""The order of an epoch before windows are shuffled: shards at random, each sample `repeat` times.

Used by `data_prep/packs.py`.
"""

# n samples in index order

import numpy as np

from data_prep.draws import draw_order, draw_uniform
from data_prep.index import IndexColumns

_CHUNK_ROWS = 1 << 20


class EpochOrder:
    """Entry e of the epoch is a sample and the number of its copy.

    Copy c of a shard's samples is a unit; the units of all shards are shuffled together, so that a sample's
    copies are spread over the epoch. A repeat of 2.3 gives two copies and, for a random 30 % of the rows, a
    third.
    """

    def __init__(self, index: IndexColumns, seed: int, epoch: int):
        self._copies = _num_copies(index, seed, epoch)
        is_first = np.r_[True, index.shard[1:] != index.shard[:-1]]
        starts = np.flatnonzero(is_first)
        ends = np.r_[starts[1:], len(index)]
        parts = []  # (starts, ends, copy, entries) of the units with the same copy number
        for copy in range(int(self._copies.max(initial=0))):
            sizes = np.add.reduceat((self._copies > copy).astype(np.int32), starts)
            used = sizes > 0
            parts.append((starts[used], ends[used], np.full(int(used.sum()), copy), sizes[used]))
        none = np.zeros(0, np.int64)
        unit_starts, unit_ends, unit_copies, sizes = (
            np.concatenate([none, *(part[n] for part in parts)]) for n in range(4)
        )
        order = draw_order("shard order", seed, epoch, index.shard[unit_starts], unit_copies)
        self._starts, self._ends, self._unit_copies = unit_starts[order], unit_ends[order], unit_copies[order]
        self._entry_starts = np.concatenate([none, [0], np.cumsum(sizes[order])])

    @property
    def num_entries(self) -> int:
        return int(self._entry_starts[-1])

    def entries(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions in the columns, copy numbers) of entries first .. last - 1, int64 each."""
        none = np.zeros(0, np.int64)
        positions, copies = [none], [none]
        unit = int(np.searchsorted(self._entry_starts, first, side="right")) - 1
        while unit < len(self._starts) and self._entry_starts[unit] < last:
            start, end, copy = self._starts[unit], self._ends[unit], self._unit_copies[unit]
            members = start + np.flatnonzero(self._copies[start:end] > copy)
            before = int(self._entry_starts[unit])
            chosen = members[max(0, first - before) : last - before]
            positions.append(chosen)
            copies.append(np.full(len(chosen), copy))
            unit += 1
        return np.concatenate(positions), np.concatenate(copies)


def _num_copies(index: IndexColumns, seed: int, epoch: int) -> np.ndarray:
    """uint16 [n]: how often each sample comes; the fractional part of `repeat` is a share drawn by seed,
    epoch and row.
    """
    copies = np.floor(index.repeat).astype(np.uint16)
    for first in range(0, len(index), _CHUNK_ROWS):
        chunk = slice(first, first + _CHUNK_ROWS)
        share = index.repeat[chunk] - np.floor(index.repeat[chunk])
        if share.any():
            copies[chunk] += draw_uniform("repeat share", seed, epoch, index.rows[chunk]) < share
    return copies
