"""Intervals of entries, and the share of the gap from random to oracle that the router closes."""

import numpy as np
import pytest

from stages.evaluate.intervals import add_intervals, comparisons, resampled_points, router_auc
from stages.evaluate.points import EvaluatedTiles, Point
from stages.evaluate.resampling import resampling
from stages.evaluate.scores import PointScores

NUM_SAMPLES = 400
SAVING = 0.75
LEVELS = {"routed": (0.95, 0.85), "random": (0.9, 0.7), "pixel_rule": (0.94, 0.8), "oracle": (1.0, 0.9)}
"""Similarity at one and at two thirds of the tiles compressed, three tiles a sample."""


def scores(entry: str, similarity: float, num_compressed: int, noise: np.ndarray, threshold=None):
    values = {"similarity": similarity + noise[None]}
    return PointScores(Point(entry, (), threshold), values, np.full((1, NUM_SAMPLES), num_compressed))


def scored_points(levels=LEVELS, spread=0.05):
    noise = np.random.default_rng(0).normal(0, spread, NUM_SAMPLES)
    ends = [("reference", 1.0, 0), ("full", 1.0, 0), ("compressed", 0.4, 3)]
    found = [scores(name, level, count, noise) for name, level, count in ends]
    return found + [
        scores(name, level, count, noise, threshold)
        for name, pair in levels.items()
        for level, count, threshold in zip(pair, (1, 2), (0.7, 0.4), strict=True)
    ]


def resampled(scored, groups=None):
    draws = resampling(groups or [""] * NUM_SAMPLES, 400, seed=0)
    return resampled_points(scored, np.full(NUM_SAMPLES, 3), SAVING, draws)


def test_the_gap_is_taken_at_the_point_nearest_two_thirds():
    point = comparisons(resampled(scored_points()), SAVING)["gap_closed"]["at_point"]
    assert point["threshold"] == 0.4 and point["tokens_saved"] == pytest.approx(0.5)
    assert point["share"] == pytest.approx((0.85 - 0.7) / (0.9 - 0.7), abs=1e-2)
    low, high = point["interval"]
    assert 0.7 < low <= point["share"] <= high < 0.8


def test_the_gap_over_the_curve_is_that_of_the_areas():
    found = comparisons(resampled(scored_points(spread=0.0)), SAVING)["gap_closed"]["over_curve"]

    def area(pair):
        return np.trapezoid([1.0, *pair, 0.4]) / 3

    areas = {name: area(pair) for name, pair in LEVELS.items()}
    expected = (areas["routed"] - areas["random"]) / (areas["oracle"] - areas["random"])
    assert found["share"] == pytest.approx(expected, abs=0.01)
    assert found["interval"] == pytest.approx([found["share"]] * 2)


def test_an_oracle_no_better_than_random_leaves_no_share():
    levels = LEVELS | {"oracle": LEVELS["random"]}
    found = comparisons(resampled(scored_points(levels)), SAVING)["gap_closed"]
    assert found["at_point"]["share"] is None and found["at_point"]["interval"] is None


def test_without_an_oracle_the_other_differences_stay():
    levels = {name: pair for name, pair in LEVELS.items() if name != "oracle"}
    found = comparisons(resampled(scored_points(levels)), SAVING)
    assert found["gap_closed"]["over_curve"]["share"] is None
    point = found["routed_minus"]["at_point"]
    assert point["pixel_rule"]["difference"] == pytest.approx(0.05, abs=2e-3) and "oracle" not in point
    assert point["pixel_rule"]["interval"][0] > 0


def test_groups_give_wider_intervals_than_samples_of_like_quality():
    """Twenty groups whose samples share their luck are twenty observations, not four hundred."""
    group = np.arange(NUM_SAMPLES) % 20
    luck = np.random.default_rng(1).normal(0, 0.3, 20)[group]
    base = np.ones(NUM_SAMPLES)
    scored = [
        PointScores(Point(name, ()), {"similarity": values[None]}, np.zeros((1, NUM_SAMPLES)))
        for name, values in (("reference", base), ("full", base + luck), ("compressed", base))
    ]

    def width(groups):
        metrics = {"reference": {}, "full": {}, "compressed": {}} | {
            name: [] for name in ("routed", "served", "random", "shuffled", "pixel_rule", "oracle")
        }
        add_intervals(metrics, resampled(scored, groups))
        assert metrics["reference"]["quality_kept_interval"] == [1.0, 1.0]
        low, high = metrics["full"]["quality_kept_interval"]
        return high - low

    assert width([str(number) for number in group]) > 2.5 * width([""] * NUM_SAMPLES)


def test_a_reference_that_answers_nothing_has_no_quality_to_keep():
    scored = [scores("reference", 0.0, 0, np.zeros(NUM_SAMPLES)), *scored_points()[1:]]
    points = resampled(scored)
    assert comparisons(points, SAVING)["gap_closed"]["at_point"]["share"] is None


def test_the_routers_auc_leaves_unlabelled_tiles_out():
    p_compress = np.array([0.9, 0.1, 0.8, 0.2, 0.5, 0.6], np.float32)
    labels = np.array([0, 1, 0, 1, -1, -1], np.int8)
    tiles = EvaluatedTiles([(2,), (2,), (2,)], p_compress, None, label_N=labels)
    found = router_auc(tiles, resampling(["", "", ""], 200, seed=0))
    assert found["auc"] == 1.0 and found["num_tiles"] == 4
