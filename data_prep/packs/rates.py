"""The rate of every tile of some samples, full or compressed: drawn by seed, epoch, row and copy, or chosen
by a router."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.draws import draw_uniform
from data_prep.packs.routed import RoutedTiles
from data_prep.shards.index import IndexColumns
from vico.errors import UserError

RATE_UNITS = ("tile", "image", "full")


@dataclass(frozen=True)
class RateDraw:
    """How rates are drawn: each tile, or all tiles of an image together, is compressed with `compress_share`.

    With unit `full` no tile is compressed. With `routed`, a tile (or image) is drawn only with probability
    `random_share`; otherwise its tiles have the rates that the router chose.
    """

    unit: Literal["tile", "image", "full"] = "tile"
    compress_share: float = 0.5
    routed: RoutedTiles | None = None
    random_share: float = 1.0

    def __post_init__(self) -> None:
        if self.unit not in RATE_UNITS:
            raise UserError(f"rate_unit={self.unit!r} is not one of {', '.join(RATE_UNITS)}")


def tile_rates(
    draw: RateDraw, samples: IndexColumns, copies: np.ndarray, *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (compressed, bool [T] over all tiles; where each of S samples starts, then the end, int64).

    Sample s is copy `copies[s]` of its row. What a sample gets does not depend on the samples beside it.
    """
    rows, image_starts, image_tiles = samples.rows, samples.image_starts, samples.image_tiles
    image_ends = np.concatenate([[0], np.cumsum(image_tiles, dtype=np.int64)])
    starts, num_tiles = image_ends[image_starts], int(image_ends[-1])
    if draw.unit == "full":
        return np.zeros(num_tiles, bool), starts
    sample_of_tile = np.repeat(np.arange(len(rows)), np.diff(starts))
    # the number of the tile, or of its image, within the sample
    drawn, first = np.arange(num_tiles), starts
    if draw.unit == "image":
        drawn, first = np.repeat(np.arange(len(image_tiles)), image_tiles), image_starts
    drawn = drawn - first[sample_of_tile]

    def uniform(purpose: str) -> np.ndarray:
        words = rows[sample_of_tile], copies[sample_of_tile], drawn
        return draw_uniform(f"{purpose} of {draw.unit}", seed, epoch, *words)

    compressed = uniform("rate") < draw.compress_share
    if draw.routed is not None:
        is_random = uniform("random rate") < draw.random_share
        compressed = np.where(is_random, compressed, draw.routed.compressed(samples))
    return compressed, starts
