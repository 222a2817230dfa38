"""The samples of an evaluation in blocks, each with everything that its samples are answered at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.evaluate.config import BLOCK_SAMPLES
from stages.evaluate.points import EvaluatedTiles, Point
from stages.evaluate.scores import rate_text

# T tiles of a sample


@dataclass(frozen=True)
class Block:
    """Some samples (rows of the index) with the distinct rate vectors of all points, bool [T] each, and the
    limits of tiles per picture under which the policy answers them once more."""

    number: int
    rows: tuple[int, ...]
    rates: tuple[tuple[np.ndarray, ...], ...]
    max_tiles: tuple[tuple[int, ...], ...]


def blocks_of(rows: list[int], tiles: EvaluatedTiles, points: Sequence[Point]) -> list[Block]:
    """Return the samples in blocks, each with the distinct rate vectors of all points in a fixed order."""
    rates_by_text: list[dict[str, np.ndarray]] = [{} for _ in rows]
    limits: list[dict[int, int]] = [{} for _ in rows]  # number of tiles -> lowest limit that gives it
    for point in points:
        for compressed in point.replicates:
            for s, flags in enumerate(point.by_sample(tiles, compressed)):
                if point.max_tiles is None:
                    rates_by_text[s].setdefault(rate_text(flags), flags)
                elif len(flags) != tiles.num_tiles_S[s]:
                    limits[s].setdefault(len(flags), point.max_tiles)
    vectors = [tuple(flags for _, flags in sorted(rates.items())) for rates in rates_by_text]
    return [
        Block(
            number,
            tuple(rows[first : first + BLOCK_SAMPLES]),
            tuple(vectors[first : first + BLOCK_SAMPLES]),
            tuple(tuple(counts.values()) for counts in limits[first : first + BLOCK_SAMPLES]),
        )
        for number, first in enumerate(range(0, len(rows), BLOCK_SAMPLES))
    ]
