"""Samples that must go because a picture of theirs stands on another side of the split too.

Groups and held-out records put samples on a side without looking at their pictures, so a picture may come
to stand on several sides; it stays on the first of test, calib, train. Called by the shard stage and by
`vico data check`.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow.compute as pc

from data_prep.shards.split import CALIB, TEST, TRAIN
from data_prep.shards.write import ShardContent

_RANKS = {TRAIN: 0, CALIB: 1, TEST: 2}


def leaked_lines(contents: Callable[[], Iterable[ShardContent]]) -> dict[int, frozenset[int]]:
    """Lines of each shard (by its place in `contents()`) that have a picture on a higher side than their own.

    `contents()` is gone through twice: first 9 bytes a picture are held, then the few pictures in question.
    """
    prefixes, ranks = [np.zeros(0, np.uint64)], [np.zeros(0, np.int8)]
    for content in contents():
        digests, rank, _ = _pictures(content)
        prefixes.append(digests[:, 0].copy())
        ranks.append(rank)
    doubtful = _on_several_sides(np.concatenate(prefixes), np.concatenate(ranks))
    if not len(doubtful):
        return {}
    highest: dict[bytes, int] = {}
    seen: list[tuple[int, int, bytes, int]] = []  # shard, line, digest, rank
    for number, content in enumerate(contents()):
        digests, rank, lines = _pictures(content)
        for n in np.flatnonzero(np.isin(digests[:, 0], doubtful)).tolist():
            digest = digests[n].tobytes()
            highest[digest] = max(highest.get(digest, 0), int(rank[n]))
            seen.append((number, int(lines[n]), digest, int(rank[n])))
    leaked: dict[int, set[int]] = {}
    for number, line, digest, rank in seen:
        if rank < highest[digest]:
            leaked.setdefault(number, set()).add(line)
    return {number: frozenset(lines) for number, lines in leaked.items()}


def _pictures(content: ShardContent) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(digest as uint64 [n, 4], rank int8 [n] of its sample's side, line int64 [n]) of a shard's pictures."""
    column = content.table["image_sha256"].combine_chunks()
    owners = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    data = b"".join(column.flatten().to_pylist())
    sides = [_RANKS[split] for split in content.table["split"].to_pylist()]
    return (
        np.frombuffer(data, np.uint64).reshape(-1, 4),
        np.array(sides, np.int8)[owners],
        content.table["line"].to_numpy()[owners],
    )


def _on_several_sides(prefixes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The prefixes that come with more than one rank."""
    order = np.argsort(prefixes, kind="stable")
    ordered, sides = prefixes[order], ranks[order]
    differs = (ordered[1:] == ordered[:-1]) & (sides[1:] != sides[:-1])
    return np.unique(ordered[1:][differs])
