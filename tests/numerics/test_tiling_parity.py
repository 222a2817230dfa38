"""The tiling equals the published one on a file of cases: `--tiling FILE`, by default the copy in
tests/data."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vico.tiling import Tiling, image_tiles, num_tiles, pixel_values, tile_boxes, tile_grid

DEFAULT = Path(__file__).parents[1] / "data" / "tiling.json"


@pytest.fixture(scope="module")
def cases(request):
    return json.loads(Path(request.config.getoption("--tiling") or DEFAULT).read_text())


def tiling(case):
    return Tiling(case["image_size"], case["max_num"], case["min_num"])


def picture(width: int, height: int) -> Image.Image:
    """Return the picture of the cases: 8-bit colour ((7x + 3y) mod 256, xy mod 256, (x xor y) mod 256) at (x,
    y)."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([(7 * x + 3 * y) % 256, x * y % 256, (x ^ y) % 256], -1).astype(np.uint8))


def test_grids_and_tile_counts(cases):
    for case in cases:
        size = case["width"], case["height"]
        assert tile_grid(*size, tiling(case)) == (case["columns"], case["rows"]), case
        assert num_tiles(*size, tiling(case)) == case["num_tiles"], case
        assert len(tile_boxes(*size, tiling(case))) == case["num_tiles"], case


def test_means_of_normalised_tiles(cases):
    compared = [case for case in cases if "tile_means" in case]
    assert compared
    for case in compared:
        means = pixel_values(picture(case["width"], case["height"]), tiling(case)).mean((2, 3))
        np.testing.assert_allclose(means, case["tile_means"], atol=2e-3, rtol=0)


def test_a_tile_is_the_crop_of_the_resized_picture():
    image = picture(300, 150)
    tiles = image_tiles(image, Tiling(56, max_tiles=4))
    resized = image.resize((112, 56), Image.Resampling.BICUBIC)
    assert [np.asarray(tile).tolist() for tile in tiles[:2]] == [
        np.asarray(resized.crop(box)).tolist() for box in ((0, 0, 56, 56), (56, 0, 112, 56))
    ]
    assert len(tiles) == 3 and tiles[2].size == (56, 56)
