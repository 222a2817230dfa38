"""Effects of tiles from losses of random masks."""

import numpy as np
import pytest

from vico.objectives.tile_effects import compressed_losses


def masks_of(num_tiles: int, num_masks: int, share: float) -> np.ndarray:
    random = np.random.default_rng(num_tiles)
    numbers = np.argsort(random.random((num_masks, num_tiles)), axis=0)
    return numbers < round(share * num_masks)


@pytest.mark.parametrize("num_tiles", [1, 2, 5, 12, 13])
def test_losses_that_add_up_are_estimated_exactly(num_tiles):
    random = np.random.default_rng(num_tiles)
    effects = random.random(num_tiles)
    masks = masks_of(num_tiles, 40, 0.6)
    compressed = compressed_losses(masks, 2.0 + masks @ effects, 2.0, 1e-9)
    np.testing.assert_allclose(compressed, 2.0 + effects, rtol=1e-6)


def test_the_penalty_pulls_effects_to_zero_and_noise_averages_out():
    random = np.random.default_rng(0)
    effects = np.array([0.0, 1.0, 0.0, 0.3])
    errors = []
    for num_masks in (16, 400):
        masks = masks_of(4, num_masks, 0.5)
        losses = 1.0 + masks @ effects + random.normal(0, 0.2, num_masks)
        errors.append(np.abs(compressed_losses(masks, losses, 1.0, 0.5) - 1.0 - effects).max())
        np.testing.assert_allclose(compressed_losses(masks, losses, 1.0, 1e9), 1.0, atol=1e-6)
    assert errors[1] < errors[0] and errors[1] < 0.06


def test_no_estimated_loss_is_negative():
    masks = np.array([[True], [False]] * 4)
    assert compressed_losses(masks, np.array([1.0, 0.0] * 4), 0.0, 1e-9) == pytest.approx([1])
    assert compressed_losses(masks, np.array([0.0, 1.0] * 4), 0.5, 1e-9) == pytest.approx([0])
