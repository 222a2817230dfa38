"""Samples to leave out because one of their pictures is also in another split.

Groups and held-out records assign samples to splits without looking at their pictures, so a picture can get
into several splits; it stays in the first of test, calib, train. The shard stage and `vico data check` call
this.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.shards.split import CALIB, TEST, TRAIN

_RANKS = {TRAIN: 0, CALIB: 1, TEST: 2}


def leaked_lines(tables: Callable[[], Iterable[pa.Table]]) -> dict[int, frozenset[int]]:
    """Return the lines of each shard with a picture in a split of higher rank than their own.

    `tables()` gives the index rows of each shard; shards are counted in its order. It is called twice: the
    first pass keeps 9 bytes per picture, the second only the few pictures in question.
    """
    prefixes, ranks = [np.zeros(0, np.uint64)], [np.zeros(0, np.int8)]
    for table in tables():
        digests, picture_ranks, _ = _pictures(table)
        prefixes.append(digests[:, 0].copy())
        ranks.append(picture_ranks)
    doubtful = _in_several_splits(np.concatenate(prefixes), np.concatenate(ranks))
    if not len(doubtful):
        return {}
    highest: dict[bytes, int] = {}
    seen: list[tuple[int, int, bytes, int]] = []  # shard, line, digest, rank
    for number, table in enumerate(tables()):
        digests, picture_ranks, lines = _pictures(table)
        for n in np.flatnonzero(np.isin(digests[:, 0], doubtful)).tolist():
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


def _pictures(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return per picture: digest (uint64 [n, 4]), rank of its sample's split (int8 [n]), line (int64 [n])."""
    column = table["image_sha256"].combine_chunks()
    owners = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    data = b"".join(column.flatten().to_pylist())
    ranks = [_RANKS[split] for split in table["split"].to_pylist()]
    return (
        np.frombuffer(data, np.uint64).reshape(-1, 4),
        np.array(ranks, np.int8)[owners],
        table["line"].to_numpy()[owners],
    )


def _in_several_splits(prefixes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return the prefixes that occur with more than one rank."""
    order = np.argsort(prefixes, kind="stable")
    ordered, ordered_ranks = prefixes[order], ranks[order]
    differs = (ordered[1:] == ordered[:-1]) & (ordered_ranks[1:] != ordered_ranks[:-1])
    return np.unique(ordered[1:][differs])
