"""The side of rows that share pictures: rows without a group that shared pictures connect have one side.

`split_of` draws the side of each row by itself, from its smallest picture. Where rows of several pictures
share some with other rows, that draw gives several sides, and `picture_sides` decides for one of them. The
shard stage, its check and its repair call it with the rows of the index, before `leaks.py` looks for pictures
that groups or held-out rows put on several sides.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.disjoint_sets import DisjointSets
from data_prep.shards.leaks import SPLIT_COLUMNS, picture_digests
from data_prep.shards.split import CALIB, TEST, TRAIN

# R rows without a group, P pictures of these rows, N shared pictures; a picture is known by the first eight
# bytes of its digest. Two pictures with the same bytes there would at worst put their rows on one side.
_NAMES = (TRAIN, CALIB, TEST)
_RANKS = {name: rank for rank, name in enumerate(_NAMES)}
_WRITTEN, _ALONE, _AMONG_OTHERS = (np.uint64(n) << np.uint64(62) for n in range(3))
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class FreeRows:
    """The rows of a table that take their side from their pictures: they have some, no group, and are not
    held out.

    `positions` int64 [R] in the table, `splits` uint8 [R] as drawn (0 train, 1 calib, 2 test), `owners` int64
    [P] the row of each picture, `starts` int64 [R] the first picture of each row, `pictures` uint64 [P].
    """

    positions: np.ndarray
    splits: np.ndarray
    owners: np.ndarray
    starts: np.ndarray
    pictures: np.ndarray

    @property
    def smallest(self) -> np.ndarray:
        """The smallest picture of each row, uint64 [R]."""
        return np.minimum.reduceat(self.pictures, self.starts) if len(self.starts) else self.pictures[:0]

    @property
    def has_several(self) -> np.ndarray:
        """Whether a row has more than one picture, bool [R]; the same picture twice is one."""
        if not len(self.starts):
            return np.zeros(0, bool)
        return self.smallest != np.maximum.reduceat(self.pictures, self.starts)


def free_rows(table: pa.Table, heldout: frozenset[str]) -> FreeRows:
    """Return the free rows of index rows; `heldout` are the names of the held-out sets."""
    has_pictures = pc.greater(pc.list_value_length(table["image_sha256"]), 0)
    free = pc.and_(has_pictures, pc.equal(table["group"], ""))
    if heldout:
        free = pc.and_not(free, pc.is_in(table["source"], pa.array(sorted(heldout))))
    positions = np.flatnonzero(free.to_numpy())
    digests, lengths = picture_digests(table["image_sha256"].take(pa.array(positions)))
    splits = table["split"].take(pa.array(positions)).to_pylist()
    return FreeRows(
        positions=positions,
        splits=np.array([_RANKS[split] for split in splits], np.uint8),
        owners=np.repeat(np.arange(len(positions)), lengths),
        starts=np.cumsum(lengths) - lengths,
        pictures=digests[:, 0],
    )


@dataclass(frozen=True, eq=False)
class PictureSides:
    """The sides of the pictures that connect rows: `pictures` uint64 [N], rising, `ranks` uint8 [N] (0 train,
    1 calib, 2 test). `heldout` are the names of the held-out sets, which have no part in it. Of `num_rows` in
    all, at most `num_connected` are connected with each other."""

    pictures: np.ndarray
    ranks: np.ndarray
    heldout: frozenset[str]
    num_rows: int = 0
    num_connected: int = 0

    def settled(self, table: pa.Table) -> pa.Table:
        """Return the table with the split of the rows that it decides, the same table if none changes."""
        if not len(self.pictures):
            return table
        rows = free_rows(table, self.heldout)
        numbers, is_known = positions_of(self.pictures, rows.pictures)
        if not is_known.any():
            return table
        drawn = table["split"].to_pylist()
        splits = drawn.copy()
        ranks = self.ranks[numbers[is_known]].tolist()
        for position, rank in zip(rows.positions[rows.owners[is_known]].tolist(), ranks, strict=True):
            splits[position] = _NAMES[rank]
        if splits == drawn:
            return table
        column = table.schema.get_field_index("split")
        return table.set_column(column, table.schema.field(column), pa.array(splits, pa.string()))

    def moved(self, table: pa.Table) -> dict[int, str]:
        """Return line -> new split of the rows whose split differs from the table."""
        settled = self.settled(table)
        if settled is table:
            return {}
        columns = (table["line"], table["split"], settled["split"])
        lines = zip(*(column.to_pylist() for column in columns), strict=True)
        return {line: after for line, before, after in lines if before != after}


def picture_sides(
    tables: Callable[[], Iterable[pa.Table]], heldout: frozenset[str], written: PictureSides | None = None
) -> PictureSides:
    """Return the sides of the pictures that rows of several pictures share with other rows.

    Connected rows take the side of one picture: the smallest among those that are alone in a row, so that
    such rows keep the side of their picture, otherwise the smallest of all. Nothing changes the sides in
    `written`, which come first.

    `tables()` gives the index rows of each shard with the splits drawn; it is called twice. Memory: 8 bytes
    per picture in the first pass, then 70 per shared picture.
    """
    shared, num_rows = _shared_pictures(tables, heldout, written)
    if not len(shared):
        return PictureSides(shared, np.zeros(0, np.uint8), heldout, num_rows)
    sets = DisjointSets(len(shared))
    best_N = np.full(len(shared), np.iinfo(np.uint64).max, np.uint64)
    num_rows_N = np.zeros(len(shared), np.int32)
    if written is not None:
        numbers, is_known = positions_of(written.pictures, shared)
        best_N[is_known] = _keys(_WRITTEN, shared[is_known], written.ranks[numbers[is_known]])
    for table in tables():
        _join(free_rows(table, heldout), shared, sets, best_N, num_rows_N)
    roots_N = sets.roots(np.arange(len(shared)))
    np.minimum.at(best_N, roots_N, best_N.copy())
    np.add.at(num_rows_N, roots_N, np.where(roots_N == np.arange(len(shared)), 0, num_rows_N))
    ranks_N = (best_N[roots_N] & np.uint64(3)).astype(np.uint8)
    return PictureSides(shared, ranks_N, heldout, num_rows, int(num_rows_N.max()))


def written_sides(tables: Iterable[pa.Table], index_path: Path, heldout: frozenset[str]) -> PictureSides:
    """Return the sides that a written index gives to the pictures of the free rows of these tables."""
    new = np.unique(np.concatenate([free_rows(table, heldout).pictures for table in tables]))
    ranks_N = np.full(len(new), len(_NAMES), np.uint8)
    index = pq.ParquetFile(index_path)
    for group in range(index.num_row_groups if len(new) else 0):
        rows = free_rows(index.read_row_group(group, [*SPLIT_COLUMNS]), heldout)
        numbers, is_known = positions_of(new, rows.pictures)
        ranks_N[numbers[is_known]] = rows.splits[rows.owners[is_known]]
    is_written = ranks_N < len(_NAMES)
    return PictureSides(new[is_written], ranks_N[is_written], heldout)


def positions_of(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position in `known` (rising) of each wanted value, and whether it is there."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    positions = np.searchsorted(known, wanted)
    positions[positions == len(known)] = 0
    return positions, known[positions] == wanted


def _shared_pictures(
    tables: Callable[[], Iterable[pa.Table]], heldout: frozenset[str], written: PictureSides | None
) -> tuple[np.ndarray, int]:
    """Return the pictures that rows of several pictures share with other rows, rising, and the number of rows
    of all tables."""
    among_others, alone, num_rows = bytearray(), bytearray(), 0
    for table in tables():
        num_rows += len(table)
        rows = free_rows(table, heldout)
        is_among = rows.has_several[rows.owners]
        among_others += rows.pictures[is_among].tobytes()
        alone += rows.pictures[~is_among].tobytes()
    among_P, alone_P = np.frombuffer(among_others, np.uint64), np.frombuffer(alone, np.uint64)
    among_P.sort()  # in place, as the next one: no second copy of all pictures
    alone_P.sort()
    shared = [among_P[1:][among_P[1:] == among_P[:-1]]]
    for first in range(0, len(among_P), _CHUNK):
        chunk = among_P[first : first + _CHUNK]
        shared.append(chunk[positions_of(alone_P, chunk)[1]])
    if written is not None:
        shared.append(written.pictures)
    return np.unique(np.concatenate(shared)), num_rows


def _join(
    rows: FreeRows, shared: np.ndarray, sets: DisjointSets, best_N: np.ndarray, num_rows_N: np.ndarray
) -> None:
    """Join the shared pictures of each row, and enter its smallest picture and number at one of them."""
    numbers, is_known = positions_of(shared, rows.pictures)
    owners, first = np.unique(rows.owners[is_known], return_index=True)
    firsts = numbers[is_known][first]
    sets.join(np.repeat(firsts, np.diff(np.append(first, is_known.sum()))), numbers[is_known])
    kind = np.where(rows.has_several, _AMONG_OTHERS, _ALONE)[owners]
    np.minimum.at(best_N, firsts, _keys(kind, rows.smallest[owners], rows.splits[owners]))
    np.add.at(num_rows_N, firsts, 1)


def _keys(kind: np.ndarray | np.uint64, pictures: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return uint64 keys that sort by kind, then picture, and hold the rank in their last two bits."""
    return kind | (pictures >> np.uint64(4)) << np.uint64(2) | ranks.astype(np.uint64)
