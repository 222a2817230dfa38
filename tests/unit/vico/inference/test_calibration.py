"""Threshold and expected calibration error of router scores."""

import numpy as np
import pytest
import torch

from vico.inference.routing import absolute_rule, calibrated_threshold, expected_calibration_error


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 2 / 3, 1.0])
def test_the_threshold_compresses_the_wanted_share(share):
    scores = np.random.default_rng(0).random(300)
    threshold = calibrated_threshold(scores, share)
    assert (scores >= threshold).mean() == pytest.approx(share, abs=0.5 / 300)
    assert 0 < threshold <= 1


def test_the_threshold_is_midway_between_neighbouring_scores():
    assert calibrated_threshold(np.array([0.9, 0.5, 0.1]), 1 / 3) == pytest.approx(0.7)


def test_a_threshold_that_compresses_nothing_holds_for_saturated_float32_scores():
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, *[0.5] * 16])
    threshold = calibrated_threshold(scores.numpy(), 0.05)
    assert not absolute_rule(scores, threshold).any()


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="no tiles"):
        calibrated_threshold(np.array([]), 0.5)


def test_the_calibration_error_is_zero_for_true_probabilities_and_large_for_false_certainty():
    probability = np.repeat([0.25, 0.75], 400)
    positive = (
        np.tile([True, False, False, False], 100).tolist() + np.tile([True, True, True, False], 100).tolist()
    )
    assert expected_calibration_error(probability, np.array(positive)) == pytest.approx(0)
    assert expected_calibration_error(np.full(100, 0.95), np.zeros(100)) == pytest.approx(0.95)


def test_ties_stay_together_on_the_nearer_side():
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert (scores >= calibrated_threshold(scores, 1 / 3)).mean() == pytest.approx(1 / 6)
    assert (scores >= calibrated_threshold(scores, 0.9)).mean() == 1


def test_saturated_scores_can_all_be_kept():
    assert (np.ones(4) >= calibrated_threshold(np.ones(4), 0.0)).sum() == 0
