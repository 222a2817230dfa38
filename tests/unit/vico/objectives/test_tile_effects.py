"""Effects of tiles from losses of random masks."""

import numpy as np
import pytest

from vico.objectives.tile_effects import losses_at_both_rates


def masks_of(num_tiles: int, num_masks: int, share: float) -> np.ndarray:
    random = np.random.default_rng(num_tiles)
    numbers = np.argsort(random.random((num_masks, num_tiles)), axis=0)
    return numbers < round(share * num_masks)


@pytest.mark.parametrize("num_tiles", [1, 2, 5, 12, 13])
def test_losses_that_add_up_are_estimated_exactly(num_tiles):
    random = np.random.default_rng(num_tiles)
    effects = random.random(num_tiles)
    masks = masks_of(num_tiles, 40, 0.6)
    full, compressed = losses_at_both_rates(masks, 2.0 + masks @ effects, 1e-9)
    np.testing.assert_allclose(compressed - full, effects, rtol=1e-6)
    # the other tiles have the rates of the masks
    others = 2.0 + masks.mean(0) @ effects - masks.mean(0) * effects
    np.testing.assert_allclose(full, others, rtol=1e-6)


def test_the_penalty_pulls_effects_to_zero_and_noise_averages_out():
    random = np.random.default_rng(0)
    effects = np.array([0.0, 1.0, 0.0, 0.3])
    errors = []
    for num_masks in (16, 400):
        masks = masks_of(4, num_masks, 0.5)
        losses = 1.0 + masks @ effects + random.normal(0, 0.2, num_masks)
        full, compressed = losses_at_both_rates(masks, losses, 0.5)
        errors.append(np.abs(compressed - full - effects).max())
        strong = losses_at_both_rates(masks, losses, 1e9)
        np.testing.assert_allclose(strong[1] - strong[0], 0, atol=1e-6)
    assert errors[1] < errors[0] and errors[1] < 0.06


def test_no_estimated_loss_is_negative():
    masks = np.array([[True], [False]] * 4)
    full, compressed = losses_at_both_rates(masks, np.array([1.0, 0.0] * 4), 1e-9)
    assert full[0] == pytest.approx(0, abs=1e-9) and compressed[0] == pytest.approx(1)
    masks = np.array([[True, False], [False, True], [True, True], [False, False]])
    full, _ = losses_at_both_rates(masks, np.array([0.0, 0.0, 4.0, 0.0]), 1e-9)
    assert (full >= 0).all()
