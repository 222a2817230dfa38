"""The rate of every tile of a sample: full or compressed, drawn by seed, epoch, row and copy."""

import numpy as np

from data_prep.draws import draw_uniform

RATE_UNITS = ("tile", "image", "full")


def tile_rates(
    unit: str,
    compress_share: float,
    *,
    seed: int,
    epoch: int,
    row: int,
    copy: int,
    tiles_per_image: np.ndarray,
) -> np.ndarray:
    """bool [T], true = compressed; T is the sum of `tiles_per_image`.

    Each tile (`tile`), or all tiles of a picture together (`image`), is compressed with probability
    `compress_share`; with `full` none is.
    """
    num_tiles = int(tiles_per_image.sum())
    if unit == "full":
        return np.zeros(num_tiles, bool)
    drawn = np.arange(num_tiles)
    if unit == "image":
        drawn = np.repeat(np.arange(len(tiles_per_image)), tiles_per_image)
    return draw_uniform(f"rate of {unit}", seed, epoch, row, copy, drawn) < compress_share
