"""Tiles per second from encoded pictures to the bytes of tiles, in one thread, with equal pixels.

    python -m benchmarks.decode --json

`floats` is the published way: the picture in RGB, scaled, cut, normalised to float32. `bytes` is
`vico.tiling.tile_pixels`. Both open the same files: pages of black text, which are gray, a page with a
coloured line of text, and photographs.
"""

import argparse
import random
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.jpeg_records import jpeg
from benchmarks.reports import interleaved, ratio, report
from data_prep.demo.canvas import SANS, font
from data_prep.demo.photographs import photograph_crop
from data_prep.demo.sources import photo_groups
from vico.picture_files import open_picture
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD, Tiling, pixel_values, tile_grid, tile_pixels

TILING = Tiling(448, max_tiles=12)
PAGE, A4_300_DPI, SCREEN = (1700, 2200), (2480, 3508), (1024, 768)


def page(size: tuple[int, int], colour: str = "black") -> Image.Image:
    """Return a white page of black text whose last line has `colour`."""
    rng, image = random.Random(0), Image.new("RGB", size, "white")
    draw, line_height = ImageDraw.Draw(image), size[1] // 60
    for line in range(2, 58):
        words = ["".join(rng.choices("aeiounrst", k=rng.randrange(2, 9))) for _ in range(14)]
        fill = colour if line == 57 else "black"
        draw.text(
            (size[0] // 12, line * line_height), " ".join(words), fill, font(SANS, line_height * 3 // 4)
        )
    return image


def photograph(size: tuple[int, int]) -> Image.Image:
    rng = random.Random(0)
    return photograph_crop(rng, photo_groups()[0], size[0] / size[1]).convert("RGB").resize(size)


def float_tiles(data: bytes) -> np.ndarray:
    """Return the tiles as the published code makes them, float32 [N, 3, S, S]."""
    image = open_picture(data).convert("RGB")
    columns, rows = tile_grid(*image.size, TILING)
    size = TILING.tile_size
    resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    boxes = [
        (x * size, y * size, (x + 1) * size, (y + 1) * size) for y in range(rows) for x in range(columns)
    ]
    tiles = [resized.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    pixels_N3SS = np.empty((len(tiles), 3, size, size), np.float32)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for pixels, tile in zip(pixels_N3SS, tiles, strict=True):
        pixels[...] = np.ascontiguousarray(np.asarray(tile).transpose(2, 0, 1))
        pixels /= np.float32(255)
        pixels -= mean
        pixels /= std
    return pixels_N3SS


def byte_tiles(data: bytes) -> np.ndarray:
    """Return the tiles as bytes, uint8 [N, 3, S, S]."""
    return tile_pixels(open_picture(data), TILING)


def repeated(tiles: Callable[[bytes], np.ndarray], data: bytes, times: int) -> int:
    return sum(len(tiles(data)) for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--times", type=int, default=4, help="decodings of a picture per repetition")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    pictures = {
        "gray_page_1700x2200": page(PAGE),
        "coloured_page_1700x2200": page(PAGE, "red"),
        "gray_page_2480x3508": page(A4_300_DPI),
        "photograph_1700x2200": photograph(PAGE),
        "photograph_1024x768": photograph(SCREEN),
    }
    rows, ratios = [], {}
    for name, picture in pictures.items():
        data = jpeg(picture)
        if not np.array_equal(float_tiles(data), pixel_values(open_picture(data), TILING)):
            raise SystemExit(f"{name}: the pixels differ")
        ways = {
            f"{name} {way}": partial(repeated, tiles, data, arguments.times) for way, tiles in WAYS.items()
        }
        measured = interleaved(ways, arguments.repetitions, "tiles")
        rows += measured
        ratios[f"{name}_vs_floats"] = ratio(measured, f"{name} bytes", f"{name} floats")
    report("decode", rows, ratios, arguments.json)


WAYS = {"floats": float_tiles, "bytes": byte_tiles}

if __name__ == "__main__":
    main()
