"""Our tiles equal those of transformers' Pillow processor for InternVL, `GotOcr2ImageProcessorPil`.

They agree in grid, order, thumbnail, resizing and normalisation. The two searches for a grid differ in one
respect: among grids with the same number of tiles, the published one goes in the order of a set, and
transformers' by columns. This could show only if two such grids are equally close to a picture; these cases
are compared too.
"""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from vico.tiling import IMAGENET_MEAN, IMAGENET_STD, Tiling, pixel_values, tile_grid


def same_grid(width: int, height: int, tiling: Tiling) -> bool:
    side = tiling.tile_size, tiling.tile_size
    theirs = get_optimal_tiled_canvas((height, width), side, tiling.min_tiles, tiling.max_tiles)
    return tuple(theirs) == tile_grid(width, height, tiling)


@pytest.mark.parametrize("max_tiles", [1, 4, 6, 12])
def test_grids_of_random_sizes(max_tiles):
    tiling = Tiling(448, max_tiles)
    sizes = np.random.default_rng(max_tiles).integers(20, 3000, (500, 2)).tolist()
    assert [size for size in sizes if not same_grid(*size, tiling)] == []


@pytest.mark.parametrize("max_tiles", [2, 6, 12])
def test_grids_when_two_are_equally_close(max_tiles):
    """Small and large pictures with an aspect ratio in the middle between those of two grids."""
    sides = range(1, max_tiles + 1)
    ratios = {Fraction(a, b) for a in sides for b in sides if a * b <= max_tiles}
    middles = {(first + second) / 2 for first in ratios for second in ratios}
    tiling = Tiling(448, max_tiles)
    different = [
        (middle, scale)
        for middle in sorted(middles)
        for scale in (1, 10, 40)
        if not same_grid(middle.numerator * scale, middle.denominator * scale, tiling)
    ]
    assert different == []


@pytest.mark.parametrize("size", [(56, 56), (600, 400), (1000, 300), (301, 777), (31, 17)], ids=str)
def test_pixels_are_equal(size):
    pixels = np.random.default_rng(sum(size)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    processor = GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        min_patches=1,
        max_patches=6,
        size={"height": 56, "width": 56},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        resample=Image.Resampling.BICUBIC,
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    ours = pixel_values(image, Tiling(56, max_tiles=6))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def test_both_convert_a_grey_picture_with_alpha_to_rgb():
    image = Image.linear_gradient("L").convert("LA")
    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    np.testing.assert_allclose(pixel_values(image, Tiling(56, max_tiles=1)), theirs, atol=1e-6, rtol=0)
