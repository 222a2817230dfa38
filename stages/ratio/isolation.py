"""Which rate vectors isolate the tiles of a sample, and each tile's loss at both rates from their losses.

Shapes: T tiles of a sample, K random masks, I images of a sample.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from data_prep.draws import draw_order, draw_uniform
from stages.ratio.config import RatioConfig
from vico.objectives.tile_effects import losses_at_both_rates, mask_windows


def rate_vectors(tiles_per_image: Sequence[int], key: str, config: RatioConfig) -> list[np.ndarray]:
    """Return the rate vectors of a sample, bool [T] each, true for compressed.

    Isolation `tile`: all tiles at the full rate, then one vector per tile with only that tile compressed.
    `image`: the same with all tiles of one image. `random`: K masks, drawn by the sample's key and the
    config's seed.
    """
    if config.isolation == "random":
        return list(random_masks(sum(tiles_per_image), key, config))
    image_of_tile = np.repeat(np.arange(len(tiles_per_image)), tiles_per_image)
    compressed = np.eye(len(image_of_tile), dtype=bool)
    if config.isolation == "image":
        compressed = image_of_tile == np.arange(len(tiles_per_image))[:, None]
    return [np.zeros(len(image_of_tile), bool), *compressed]


def random_masks(num_tiles: int, key: str, config: RatioConfig) -> np.ndarray:
    """Return the random masks of a sample, bool [K, T]; they depend on nothing but the arguments."""
    word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    num_blocks = -(-config.masks // num_tiles)
    tiles = np.arange(num_tiles)
    orders = [draw_order("order of masks", config.seed, word, block, tiles) for block in range(num_blocks)]
    offset = float(draw_uniform("sizes of masks", config.seed, word)[0])
    return mask_windows(orders, config.masks, config.compress_share, offset)


def tile_losses(
    tiles_per_image: Sequence[int], rates: Sequence[np.ndarray], losses: np.ndarray, config: RatioConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return (loss with the tile at the full rate, loss with it compressed) of each tile, float64 [T] each.

    `losses` are those of the sample's `rate_vectors`. With isolation `image` all tiles of an image have its
    loss.
    """
    if config.isolation == "random":
        return losses_at_both_rates(np.stack(rates), losses, config.ridge)
    num_tiles = sum(tiles_per_image)
    compressed = losses[1:]
    if config.isolation == "image":
        compressed = np.repeat(compressed, tiles_per_image)
    return np.full(num_tiles, losses[0]), compressed
