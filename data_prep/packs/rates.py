"""The rate of every tile of some samples: full or compressed, drawn by seed, epoch, row and copy."""

import numpy as np

from data_prep.draws import draw_uniform

RATE_UNITS = ("tile", "image", "full")


def tile_rates(
    unit: str,
    compress_share: float,
    *,
    seed: int,
    epoch: int,
    rows: np.ndarray,
    copies: np.ndarray,
    image_starts: np.ndarray,
    image_tiles: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [T], true = compressed; where each of S samples' tiles start and the last end, int64 [S + 1]).

    Sample s is copy `copies[s]` of `rows[s]`, its pictures `image_starts[s]` to `image_starts[s + 1]` have
    `image_tiles` tiles, T in all. Each tile (`tile`), or all tiles of a picture together (`image`), is
    compressed with probability `compress_share`; with `full` none is. What a sample gets does not depend on
    those beside it.
    """
    image_ends = np.concatenate([[0], np.cumsum(image_tiles, dtype=np.int64)])
    starts, num_tiles = image_ends[image_starts], int(image_ends[-1])
    if unit == "full":
        return np.zeros(num_tiles, bool), starts
    sample_of_tile = np.repeat(np.arange(len(rows)), np.diff(starts))
    drawn, first = np.arange(num_tiles), starts
    if unit == "image":
        drawn, first = np.repeat(np.arange(len(image_tiles)), image_tiles), image_starts
    drawn = drawn - first[sample_of_tile]  # within its sample
    uniform = draw_uniform(
        f"rate of {unit}", seed, epoch, rows[sample_of_tile], copies[sample_of_tile], drawn
    )
    return uniform < compress_share, starts
