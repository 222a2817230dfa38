"""Cut a picture into tiles as InternVL does: the grid with the closest aspect ratio, the thumbnail last.

Pure functions over Pillow pictures. The sharder counts tiles with them, the reader cuts them.

Shapes: N tiles of a picture, S tile side in pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_STRIP_ROWS = 64  # a strip fits into the cache


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut: tiles of `tile_size` pixels, in grids of `min_tiles` to `max_tiles` tiles.

    The thumbnail does not count towards these limits.
    """

    tile_size: int
    max_tiles: int = 12
    min_tiles: int = 1
    use_thumbnail: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(
                f"min_tiles={self.min_tiles} and max_tiles={self.max_tiles}: need 1 <= min <= max"
            )


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return (columns, rows) of every grid, by number of tiles.

    The published search sorts a set of tuples, so grids with equal numbers of tiles keep the order of that
    set. The order decides ties in aspect ratio; parity needs the same construction.
    """
    grids = {
        (columns, rows)
        for n in range(min_tiles, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=4096)
def tile_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Return (columns, rows) of the grid whose aspect ratio is closest to that of the picture.

    Between grids that are equally close, a later one in the search wins if the picture covers more than
    half of its area.
    """
    aspect_ratio = width / height
    best_difference, best = math.inf, (1, 1)
    for columns, rows in _grids(tiling.min_tiles, tiling.max_tiles):
        difference = abs(aspect_ratio - columns / rows)
        if difference < best_difference:
            best_difference, best = difference, (columns, rows)
        elif difference == best_difference and width * height > 0.5 * tiling.tile_size**2 * columns * rows:
            best = (columns, rows)
    return best


def num_tiles(width: int, height: int, tiling: Tiling) -> int:
    """Return the number of tiles of a picture of this size, including a thumbnail if it has one."""
    columns, rows = tile_grid(width, height, tiling)
    cells = columns * rows
    return cells + int(tiling.use_thumbnail and cells > 1)


def tile_boxes(width: int, height: int, tiling: Tiling) -> list[tuple[float, float, float, float]]:
    """Return (left, top, right, bottom) of every tile in picture pixels, in prompt order.

    The thumbnail's box is the whole picture.
    """
    columns, rows = tile_grid(width, height, tiling)
    cell_width, cell_height = width / columns, height / rows
    boxes = [
        (column * cell_width, row * cell_height, (column + 1) * cell_width, (row + 1) * cell_height)
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.use_thumbnail and len(boxes) > 1:
        boxes.append((0.0, 0.0, float(width), float(height)))
    return boxes


def image_tiles(image: Image.Image, tiling: Tiling) -> list[Image.Image]:
    """Return the tiles as RGB pictures of `tile_size`, row by row; if there are several, a thumbnail last."""
    return [tile.convert("RGB") for tile in _resized_tiles(image, tiling)]


def _resized_tiles(image: Image.Image, tiling: Tiling) -> list[Image.Image]:
    """Return the tiles as RGB pictures, or as gray ones if all channels of the picture are equal."""
    image = _one_channel(image)
    columns, rows = tile_grid(*image.size, tiling)
    size = tiling.tile_size
    resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def _one_channel(image: Image.Image) -> Image.Image:
    """Return the picture in RGB, or as one gray channel if red, green and blue are equal everywhere.

    Scans and renderings of text mostly are. Pillow scales each channel by itself, so the pixels are the same
    in a third of the time.
    """
    if image.mode == "L":
        return image
    image = image.convert("RGB")
    for top in range(0, image.height, _STRIP_ROWS):  # most coloured pictures differ in the first strip
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height)))
        red, green, blue = np.moveaxis(np.asarray(strip), -1, 0)
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            return image
    return image.getchannel(0)


def tile_pixels(image: Image.Image, tiling: Tiling) -> np.ndarray:
    """Return the tiles as uint8 [N, 3, S, S]. `vico/model/pixels.py` normalises them, on the device."""
    tiles = _resized_tiles(image, tiling)
    pixels_N3SS = np.empty((len(tiles), 3, tiling.tile_size, tiling.tile_size), np.uint8)
    for pixels_3SS, tile in zip(pixels_N3SS, tiles, strict=True):
        levels = np.asarray(tile)
        pixels_3SS[...] = levels if levels.ndim == 2 else levels.transpose(2, 0, 1)
    return pixels_N3SS


def pixel_values(image: Image.Image, tiling: Tiling) -> np.ndarray:
    """Return the tiles as float32 [N, 3, S, S], scaled to 0..1 and normalised with ImageNet's constants."""
    mean_311, std_311 = (
        np.asarray(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    pixels_N3SS = tile_pixels(image, tiling).astype(np.float32)
    pixels_N3SS /= np.float32(255)
    pixels_N3SS -= mean_311
    pixels_N3SS /= std_311
    return pixels_N3SS
