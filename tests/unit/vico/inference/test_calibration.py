"""The placement of a router's threshold, and the calibration error of its scores."""

import numpy as np
import pytest
import torch

from vico.inference.calibration import log_odds, placed_threshold, reliability, share_near
from vico.inference.routing import absolute_rule


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 2 / 3, 1.0])
def test_without_tolerance_the_threshold_compresses_the_wanted_share(share):
    scores = np.random.default_rng(0).random(300)
    threshold = placed_threshold(scores, share, 0.0)
    assert (scores >= threshold.value).mean() == threshold.share == pytest.approx(share, abs=0.5 / 300)
    assert 0 < threshold.value <= 1


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_in_the_widest_gap_that_the_tolerance_allows(seed):
    scores = np.random.default_rng(seed).random(400)
    exact, placed = placed_threshold(scores, 0.6, 0.0), placed_threshold(scores, 0.6, 0.03)
    assert abs(placed.share - 0.6) <= 0.03
    ordered = np.sort(log_odds(scores))
    gaps = np.diff(ordered)
    shares_above = 1 - np.arange(1, 400) / 400
    widest = gaps[np.abs(shares_above - 0.6) <= 0.03 + 1e-9].max()
    assert placed.margin == pytest.approx(widest / 2)
    assert placed.margin >= exact.margin


def test_a_clump_of_scores_is_not_cut():
    """A router scored white tiles 0.8187 and was cut at 0.8193, so that it kept all of them."""
    clump = 0.8187 + np.linspace(-5e-4, 5e-4, 19)
    scores = np.concatenate([np.linspace(0.05, 0.80, 270), clump, np.linspace(0.84, 0.99, 181)])
    share = (scores >= clump[9]).mean()
    threshold = placed_threshold(scores, share, 0.025)
    assert threshold.value < clump.min() or threshold.value > clump.max()
    assert abs(threshold.share - share) <= 0.025
    assert share_near(scores, threshold.value, threshold.margin * 0.99) == 0
    assert share_near(scores, placed_threshold(scores, share, 0.0).value, 0.01) > 0.03


def test_blank_tiles_are_compressed_if_the_tolerance_allows():
    scores = np.linspace(0.01, 0.99, 99)
    blank = np.array([0.585, 0.9])
    assert placed_threshold(scores, 0.4, 0.01, blank).num_blank_kept == 1
    threshold = placed_threshold(scores, 0.4, 0.05, blank)
    assert threshold.num_blank_kept == 0
    assert threshold.value <= 0.585
    assert threshold.share <= 0.45


def test_the_threshold_is_midway_in_log_odds():
    threshold = placed_threshold(np.array([0.9, 0.5, 0.1]), 1 / 3)
    assert threshold.value == pytest.approx(0.75)  # odds 9 and 1: odds 3
    assert threshold.margin == pytest.approx(np.log(3))


def test_a_threshold_that_compresses_nothing_holds_for_saturated_float32_scores():
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, *[0.5] * 16])
    threshold = placed_threshold(scores.numpy(), 0.0)
    assert not absolute_rule(scores, threshold.value).any()
    assert (np.ones(4) >= placed_threshold(np.ones(4), 0.0).value).sum() == 0


def test_the_ends_are_not_taken_for_a_share_between():
    scores = np.linspace(0.1, 0.9, 100)
    assert placed_threshold(scores, 0.99, 0.02).share < 1
    assert placed_threshold(scores, 0.01, 0.02).share > 0


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="no tiles"):
        placed_threshold(np.array([]), 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        placed_threshold(np.array([0.1, value]), 0.5)
    with pytest.raises(ValueError, match="not finite"):
        placed_threshold(np.array([0.1, 0.2]), 0.5, blank_probability_B=np.array([value]))


def test_a_threshold_separates_neighbouring_scores_where_it_is_compared():
    """Tiles are compared in float32, where the middle of two neighbours may be the lower one."""
    lower_N = np.random.default_rng(0).random(200, dtype=np.float32)
    for lower in lower_N:
        scores = np.array([lower, np.nextafter(lower, np.float32(2))])
        threshold = placed_threshold(scores, 0.5, 0.0)
        assert (scores >= threshold.value).mean() == threshold.share == 0.5


def test_ties_stay_together_on_the_nearer_side():
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert placed_threshold(scores, 1 / 3).share == pytest.approx(1 / 6)
    assert placed_threshold(scores, 1.0).share == 1


def test_the_calibration_error_is_zero_for_true_probabilities_and_large_for_false_certainty():
    probability = np.repeat([0.25, 0.75], 400)
    positive = (
        np.tile([True, False, False, False], 100).tolist() + np.tile([True, True, True, False], 100).tolist()
    )
    bins = reliability(probability, np.array(positive))
    assert bins.error == pytest.approx(0)
    assert bins.counts_K.tolist() == [400, 400]
    assert reliability(np.full(100, 0.95), np.zeros(100)).error == pytest.approx(0.95)
    assert reliability(np.array([]), np.array([])).error == 0
