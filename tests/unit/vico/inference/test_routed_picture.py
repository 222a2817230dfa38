"""What the drawing of a routed picture shows."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vico.inference.routed_picture import routed_picture, tinted
from vico.settings import ModelSettings
from vico.tiling import num_tiles

SETTINGS = ModelSettings(
    tile_size=56,
    tokens_full=16,
    tokens_compressed=4,
    vision_tokens=64,
    image_token_id=4,
    min_tiles=1,
    max_tiles=4,
    use_thumbnail=True,
    vocab_size=10,
)
TILING = SETTINGS.tiling()
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8))


def drawn(compressed: list[bool]) -> np.ndarray:
    return np.asarray(routed_picture(PICTURE, TILING, SETTINGS, compressed)).astype(int)


def test_only_the_compressed_tile_changes():
    kept = drawn([False] * 5)
    changed = np.abs(drawn([False, True, False, False, False]) - kept).sum(-1) > 0
    half = 248  # a tile of 240 pixels, its frames and half of the gap; the caption is below
    inside = changed[: half + 30, half : 2 * half]
    assert inside[40:].mean() > 0.9
    assert changed[: 2 * half].sum() == inside.sum()
    thumbnail = np.abs(drawn([False, False, False, False, True]) - kept).sum(-1) > 0
    assert not thumbnail[:, : 2 * half][: 2 * half].any() and thumbnail[: 2 * half, 2 * half :].any()


def places(picture: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Return where a picture has exactly the pixels of a tile."""
    first = np.argwhere((picture == tile[0, 0]).all(-1))
    height, width = tile.shape[:2]
    return [
        (top, left)
        for top, left in first
        if (left + width, top + height) <= (picture.shape[1], picture.shape[0])
        and np.array_equal(picture[top : top + height, left : left + width], tile)
    ]


@pytest.mark.parametrize("compressed", [[False] * 5, [True] * 5, [True, False, False, True, False]])
def test_labels_and_frames_cover_no_pixel_of_the_picture(compressed):
    picture = drawn(compressed).astype(np.uint8)
    large = PICTURE.resize((480, 480), Image.Resampling.NEAREST)
    corners = []
    for box, flag in zip(((0, 0), (240, 0), (0, 240), (240, 240)), compressed, strict=False):
        tile = large.crop((*box, box[0] + 240, box[1] + 240))
        [corner] = places(picture, np.asarray(tinted(tile) if flag else tile))
        corners.append(corner)
    assert corners == sorted(corners) and corners[0][1] == corners[2][1] < corners[1][1] - 240


def test_the_tint_keeps_text_apart_from_its_paper():
    def contrast(ink: int, paper: int) -> float:
        """Return the contrast of WCAG 2, which asks for 4.5 in small text."""
        pixels = [tinted(Image.new("RGB", (1, 1), (tone, tone, tone))) for tone in (ink, paper)]
        shades = [np.asarray(pixel)[0, 0] / 255 for pixel in pixels]
        linear = [((shade + 0.055) / 1.055) ** 2.4 @ (0.2126, 0.7152, 0.0722) for shade in shades]
        return (max(linear) + 0.05) / (min(linear) + 0.05)

    assert contrast(0, 255) > 7 and contrast(255, 0) > 7
    assert contrast(90, 255) > 4.5, "grey on white"


def test_a_single_tile_has_no_thumbnail():
    small = PICTURE.resize((56, 56))
    assert num_tiles(56, 56, TILING) == 1
    assert routed_picture(small, TILING, SETTINGS, [True]).width < 500
    assert routed_picture(PICTURE, TILING, SETTINGS, [True] * 5).width > 600


@pytest.mark.parametrize("max_tiles", [4, 12, 400])
@pytest.mark.parametrize("size", [(3000, 200), (3, 40), (1, 600), (600, 1), (1, 1), (2, 20_000), (31, 479)])
def test_extreme_pictures_can_be_drawn(size, max_tiles):
    tiling = replace(TILING, max_tiles=max_tiles)
    count = num_tiles(*size, tiling)
    for long_side in (1600, 480):
        image = PICTURE.resize(size).convert("L")
        picture = routed_picture(
            image, tiling, SETTINGS, [True, False] * (count // 2) + [True] * (count % 2), long_side
        )
        assert max(picture.size) < 1.5 * max(long_side, 480), (
            "thumbnail, frames and labels together take less than half of the picture's room"
        )


def test_each_tile_needs_a_decision():
    with pytest.raises(ValueError, match="4 decisions for 5 tiles"):
        drawn([True] * 4)
