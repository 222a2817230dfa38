"""Which rate vectors isolate the tiles of a sample, and each tile's loss at both rates from their losses.

Shapes: T tiles of a sample, K random masks, I images of a sample.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from data_prep.draws import draw_order
from stages.ratio.config import RatioConfig
from vico.objectives.tile_effects import compressed_losses


def rate_vectors(tiles_per_image: Sequence[int], key: str, config: RatioConfig) -> list[np.ndarray]:
    """Return the rate vectors of a sample, bool [T] each, true for compressed.

    The first has all tiles at the full rate. Isolation `tile`: then one vector per tile with only that tile
    compressed. `image`: the same with all tiles of one image. `random`: K masks, drawn by the sample's key
    and the config's seed.
    """
    if config.isolation == "random":
        num_tiles = sum(tiles_per_image)
        return [np.zeros(num_tiles, bool), *random_masks(num_tiles, key, config)]
    image_of_tile = np.repeat(np.arange(len(tiles_per_image)), tiles_per_image)
    compressed = np.eye(len(image_of_tile), dtype=bool)
    if config.isolation == "image":
        compressed = image_of_tile == np.arange(len(tiles_per_image))[:, None]
    return [np.zeros(len(image_of_tile), bool), *compressed]


def random_masks(num_tiles: int, key: str, config: RatioConfig) -> np.ndarray:
    """Return the random masks of a sample, bool [K, T]; they depend on nothing but the arguments.

    Each tile is compressed in the same number of masks, `compress_share` of them, which are drawn for each
    tile by itself. So the number of compressed tiles varies, without which only differences between effects
    would show.
    """
    word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    masks = np.zeros((config.masks, num_tiles), bool)
    num_compressed = round(config.compress_share * config.masks)
    for tile in range(num_tiles):
        order = draw_order("random masks", config.seed, word, tile, np.arange(config.masks))
        masks[order[:num_compressed], tile] = True
    return masks


def tile_losses(
    tiles_per_image: Sequence[int], rates: Sequence[np.ndarray], losses: np.ndarray, config: RatioConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return (loss with the tile at the full rate, loss with it compressed) of each tile, float64 [T] each.

    `losses` are those of the sample's `rate_vectors`. With isolation `image` all tiles of an image have its
    loss.
    """
    num_tiles = sum(tiles_per_image)
    compressed = losses[1:]
    if config.isolation == "image":
        compressed = np.repeat(compressed, tiles_per_image)
    if config.isolation == "random":
        compressed = compressed_losses(np.stack(rates[1:]), losses[1:], float(losses[0]), config.ridge)
    return np.full(num_tiles, losses[0]), compressed
