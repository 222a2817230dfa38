"""Tiles travel as bytes: the same values as normalised floats, and gray pictures take one channel."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.model.pixels import normalised
from vico.tiling import Tiling, image_tiles, pixel_values, tile_pixels

TILING = Tiling(56, max_tiles=6)


def coloured(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def published_tiles(image: Image.Image) -> list[np.ndarray]:
    """Return the tiles as InternVL cuts them: the whole picture in RGB, scaled, then cropped."""
    rgb = image.convert("RGB")
    resized = rgb.resize((3 * 56, 2 * 56), Image.Resampling.BICUBIC)
    boxes = [(56 * x, 56 * y, 56 * x + 56, 56 * y + 56) for y in range(2) for x in range(3)]
    tiles = [resized.crop(box) for box in boxes] + [rgb.resize((56, 56), Image.Resampling.BICUBIC)]
    return [np.asarray(tile) for tile in tiles]


def test_every_level_has_the_value_of_the_float_path():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    image = Image.fromarray(levels[0])
    tiling = Tiling(16, 1)
    ours = normalised(torch.from_numpy(tile_pixels(image, tiling))).numpy()
    assert np.array_equal(ours, pixel_values(image, tiling))


def test_the_tower_sees_the_same_of_bytes_and_of_floats(tmp_path):
    model = load_model(make_tiny_model(tmp_path / "m"), torch.float32)
    size = model.settings.tile_size
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, size, size), np.uint8)
    floats = normalised(torch.from_numpy(pixels))
    with torch.no_grad():
        assert torch.equal(model.vision_features(torch.from_numpy(pixels)), model.vision_features(floats))


GRAY = coloured((310, 211)).convert("L")


@pytest.mark.parametrize(
    "image",
    [
        GRAY,
        GRAY.convert("RGB"),
        GRAY.convert("RGBA"),
        GRAY.convert("1"),
        GRAY.convert("P"),
        coloured((310, 211)),
        coloured((310, 211)).convert("CMYK"),
        coloured((310, 211)).quantize(64),
    ],
    ids=["gray", "gray in RGB", "gray in RGBA", "bits", "gray palette", "RGB", "CMYK", "palette"],
)
def test_tiles_are_those_of_the_picture_in_rgb(image):
    expected = published_tiles(image)
    assert [np.asarray(tile).tolist() for tile in image_tiles(image, TILING)] == [
        t.tolist() for t in expected
    ]
    assert np.array_equal(tile_pixels(image, TILING), np.stack(expected).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("place", [(0, 0), (309, 0), (150, 64), (0, 210), (309, 210)], ids=str)
def test_one_coloured_pixel_makes_a_coloured_picture(place):
    image = GRAY.convert("RGB")
    level = image.getpixel(place)[0]
    image.putpixel(place, (level, level, level ^ 255))
    assert np.array_equal(tile_pixels(image, TILING), np.stack(published_tiles(image)).transpose(0, 3, 1, 2))


def test_a_gray_jpeg_and_its_rgb_twin_give_the_same_tiles():
    data = io.BytesIO()
    GRAY.save(data, "JPEG")
    image = Image.open(data)
    assert image.mode == "L"
    assert np.array_equal(tile_pixels(image, TILING), tile_pixels(image.convert("RGB"), TILING))
