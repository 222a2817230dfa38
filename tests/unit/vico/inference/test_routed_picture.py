"""What the drawing of a routed picture shows."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vico.inference.routed_picture import routed_picture
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
    side = 480  # the picture is enlarged to this; the caption is below, the thumbnail to the right
    inside = changed[: side // 2, side // 2 : side]
    assert inside.mean() > 0.9
    assert changed[:side].sum() == inside.sum()
    thumbnail = np.abs(drawn([False, False, False, False, True]) - kept).sum(-1) > 0
    assert not thumbnail[:side, :side].any() and thumbnail[:side, side:].any()


def test_a_single_tile_has_no_thumbnail():
    small = PICTURE.resize((56, 56))
    assert num_tiles(56, 56, TILING) == 1
    assert routed_picture(small, TILING, SETTINGS, [True]).width == 480
    assert routed_picture(PICTURE, TILING, SETTINGS, [True] * 5).width > 480


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
        assert max(picture.size) < 1.4 * max(long_side, 480), (
            "also the thumbnail is not larger than the picture"
        )


def test_each_tile_needs_a_decision():
    with pytest.raises(ValueError, match="4 decisions for 5 tiles"):
        drawn([True] * 4)
