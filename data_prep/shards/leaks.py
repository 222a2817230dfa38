"""Samples to leave out because one of their pictures is also in another split.

Groups and held-out records assign samples to splits without looking at their pictures, so a picture can get
into several splits; it stays in the first of test, calib, train. The shard stage and `vico data check` call
this after `picture_sides.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.shards.split import CALIB, TEST, TRAIN

SPLIT_COLUMNS = ("line", "split", "group", "source", "image_sha256")
"""The columns of the index that the split of a sample depends on."""
_RANKS = {TRAIN: 0, CALIB: 1, TEST: 2}
_RANK_BITS, _CHUNK = np.uint64(2), 1 << 20


def leaked_lines(tables: Callable[[], Iterable[pa.Table]]) -> dict[int, frozenset[int]]:
    """Return the lines of each shard with a picture in a split of higher rank than their own.

    `tables()` gives the index rows of each shard; shards are counted in its order. It is called twice: the
    first pass keeps 8 bytes per picture, the second only the few pictures in question.
    """
    keys = bytearray()
    for table in tables():
        digests, picture_ranks, _ = _pictures(table)
        keys += (_beginnings(digests) << _RANK_BITS | picture_ranks.astype(np.uint64)).tobytes()
    doubtful = _in_several_splits(np.frombuffer(keys, np.uint64))
    del keys
    if not len(doubtful):
        return {}
    highest: dict[bytes, int] = {}
    seen: list[tuple[int, int, bytes, int]] = []  # shard, line, digest, rank
    for number, table in enumerate(tables()):
        digests, picture_ranks, lines = _pictures(table)
        for n in np.flatnonzero(np.isin(_beginnings(digests), doubtful)).tolist():
            digest, rank = digests[n].tobytes(), int(picture_ranks[n])
            highest[digest] = max(highest.get(digest, 0), rank)
            seen.append((number, int(lines[n]), digest, rank))
    leaked: dict[int, set[int]] = {}
    for number, line, digest, rank in seen:
        if rank < highest[digest]:
            leaked.setdefault(number, set()).add(line)
    return {number: frozenset(lines) for number, lines in leaked.items()}


def lines_in_other_splits(tables: Sequence[pa.Table], index_path: Path) -> list[set[int]]:
    """Return the lines of each table with a picture that samples of a written index have in another split.

    Those samples are kept, whichever split they are in.
    """
    pictures = {
        digest for table in tables for digests in table["image_sha256"].to_pylist() for digest in digests
    }
    splits: dict[bytes, set[str]] = {}
    index = pq.ParquetFile(index_path)
    for group in range(index.num_row_groups if pictures else 0):
        old = index.read_row_group(group, ["split", "image_sha256"])
        for split, digests in zip(old["split"].to_pylist(), old["image_sha256"].to_pylist(), strict=True):
            for digest in pictures.intersection(digests):
                splits.setdefault(digest, set()).add(split)
    lines: list[set[int]] = []
    for table in tables:
        rows = zip(*(table[name].to_pylist() for name in ("line", "split", "image_sha256")), strict=True)
        lines.append(
            {line for line, split, digests in rows if any(splits.get(d, set()) - {split} for d in digests)}
        )
    return lines


def picture_digests(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the digests of a column `image_sha256`, uint64 [n, 4] that sort like their bytes, and the number
    of each row."""
    lengths = pc.list_value_length(column).to_numpy()
    data = b"".join(column.combine_chunks().flatten().to_pylist())
    return np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 4), lengths.astype(np.int64)


def _pictures(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return per picture: digest (uint64 [n, 4]), rank of its sample's split (int8 [n]), line (int64 [n])."""
    digests, lengths = picture_digests(table["image_sha256"])
    owners = np.repeat(np.arange(len(table)), lengths)
    ranks = [_RANKS[split] for split in table["split"].to_pylist()]
    return digests, np.array(ranks, np.int8)[owners], table["line"].to_numpy()[owners]


def _beginnings(digests: np.ndarray) -> np.ndarray:
    """Return the first 62 bits of each digest, uint64 [n]."""
    return digests[:, 0] >> _RANK_BITS


def _in_several_splits(keys: np.ndarray) -> np.ndarray:
    """Return the beginnings of digests that occur with more than one rank; sorts `keys` in place."""
    keys.sort()
    doubtful = [np.zeros(0, np.uint64)]
    for first in range(0, len(keys), _CHUNK):
        chunk = keys[first : first + _CHUNK + 1]  # with the first of the next, to compare it with
        beginnings = chunk >> _RANK_BITS
        doubtful.append(beginnings[1:][(beginnings[1:] == beginnings[:-1]) & (chunk[1:] != chunk[:-1])])
    return np.unique(np.concatenate(doubtful))
