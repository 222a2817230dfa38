"""Intervals of points, and the share of the gap from random to oracle that the router closes."""

import numpy as np
import pytest

from stages.controls import ALL, BY_NAME, LISTED
from stages.evaluate.intervals import add_intervals, comparisons, resampled_points, router_auc
from stages.evaluate.points import EvaluatedTiles, Point
from stages.evaluate.resampling import resampling
from stages.evaluate.scores import PointScores

NUM_SAMPLES = 400
SAVING = 0.75
LEVELS = {"routed": (0.95, 0.85), "random": (0.9, 0.7), "pixel_rule": (0.94, 0.8), "oracle": (1.0, 0.9)}
"""Similarity with one and with two of the three tiles of a sample compressed."""


def scores(
    name: str, similarity: float, num_compressed: int, noise: np.ndarray, threshold=None, num_dropped=0
):
    values = {"similarity": similarity + noise[None], "exact_match": noise[None] < similarity - 0.9}
    point = Point(BY_NAME[name], (), threshold)
    compressed = np.full((1, NUM_SAMPLES), num_compressed)
    return PointScores(point, values, compressed, np.full(NUM_SAMPLES, num_dropped))


def scored_points(levels=LEVELS, spread=0.05):
    noise = np.random.default_rng(0).normal(0, spread, NUM_SAMPLES)
    ends = [("reference", 1.0, 0), ("full", 1.0, 0), ("compressed", 0.4, 3)]
    return [scores(name, level, count, noise) for name, level, count in ends] + [
        scores(name, level, count, noise, threshold)
        for name, pair in levels.items()
        for level, count, threshold in zip(pair, (1, 2), (0.7, 0.4), strict=True)
    ]


def resampled(scored, groups=None):
    draws = resampling(groups or [""] * NUM_SAMPLES, [[]] * NUM_SAMPLES, 400, seed=0)
    return resampled_points(scored, np.full(NUM_SAMPLES, 3), SAVING, draws)


def test_the_gap_is_taken_at_the_point_nearest_two_thirds():
    point = comparisons(resampled(scored_points()), SAVING)["gap_closed"]["at_point"]
    assert point["threshold"] == 0.4 and point["tokens_saved"] == pytest.approx(0.5)
    assert point["share"] == pytest.approx((0.85 - 0.7) / (0.9 - 0.7), abs=1e-2)
    low, high = point["interval"]
    assert 0.7 < low <= point["share"] <= high < 0.8


def test_the_gap_over_the_curve_compares_areas():
    gap = comparisons(resampled(scored_points(spread=0.0)), SAVING)["gap_closed"]["over_curve"]

    def area(pair):
        return np.trapezoid([1.0, *pair, 0.4]) / 3

    areas = {name: area(pair) for name, pair in LEVELS.items()}
    expected = (areas["routed"] - areas["random"]) / (areas["oracle"] - areas["random"])
    assert gap["share"] == pytest.approx(expected, abs=0.01)
    assert gap["interval"] == pytest.approx([gap["share"]] * 2)


def test_an_oracle_no_better_than_random_leaves_no_share():
    levels = LEVELS | {"oracle": LEVELS["random"]}
    gap = comparisons(resampled(scored_points(levels)), SAVING)["gap_closed"]
    assert gap["at_point"]["share"] is None and gap["at_point"]["interval"] is None


def test_without_an_oracle_the_other_differences_stay():
    levels = {name: pair for name, pair in LEVELS.items() if name != "oracle"}
    compared = comparisons(resampled(scored_points(levels)), SAVING)
    assert compared["gap_closed"]["over_curve"]["share"] is None
    point = compared["routed_minus"]["at_point"]
    assert point["pixel_rule"]["difference"] == pytest.approx(0.05, abs=2e-3) and "oracle" not in point
    assert point["pixel_rule"]["interval"][0] > 0


def test_the_distance_to_the_oracle_is_split_by_the_blind_oracle():
    levels = LEVELS | {"blind_oracle": (0.98, 0.88), "seeing_oracle": (0.99, 0.89)}
    split = comparisons(resampled(scored_points(levels)), SAVING)["oracle_split"]
    at_point = split["at_point"]
    assert at_point["threshold"] == 0.4 and at_point["tokens_saved"] == pytest.approx(0.5)
    assert at_point["better_router"]["difference"] == pytest.approx(0.88 - 0.85, abs=2e-3)
    assert at_point["question"]["difference"] == pytest.approx(0.01, abs=2e-3)
    low, high = at_point["better_router"]["interval"]
    assert 0.02 < low < high < 0.04
    assert split["over_curve"]["question"]["difference"] > 0
    assert comparisons(resampled(scored_points()), SAVING)["oracle_split"] is None


def test_fewer_tiles_are_compared_where_their_curve_reaches():
    noise = np.random.default_rng(0).normal(0, 0.05, NUM_SAMPLES)
    fewer = [scores("fewer_tiles", 0.7, 0, noise, num_dropped=2)]  # 2 of 3 tiles: 2/3 of the tokens
    minus = comparisons(resampled([*scored_points(), *fewer]), SAVING)["routed_minus"]
    # on the line from (0, 1.0) to (2/3, 0.7) at half of the tokens
    assert minus["at_point"]["fewer_tiles"]["difference"] == pytest.approx(0.85 - 0.775, abs=3e-3)
    assert minus["over_curve"]["fewer_tiles"] == {"difference": None, "interval": None}


def test_groups_give_wider_intervals_than_samples_of_like_quality():
    """Twenty groups whose samples share a random effect are twenty observations, not four hundred."""
    group = np.arange(NUM_SAMPLES) % 20
    effect = np.random.default_rng(1).normal(0, 0.3, 20)[group]
    base = np.ones(NUM_SAMPLES)
    scored = [
        PointScores(
            Point(BY_NAME[name], ()),
            {"similarity": values[None], "exact_match": values[None] > 1},
            np.zeros((1, NUM_SAMPLES)),
            np.zeros(NUM_SAMPLES),
        )
        for name, values in (("reference", base), ("full", base + effect), ("compressed", base))
    ]

    def width(groups):
        metrics = {control.name: [] if control in LISTED else {} for control in ALL}
        add_intervals(metrics, resampled(scored, groups))
        assert metrics["reference"]["quality_kept_interval"] == [1.0, 1.0]
        low, high = metrics["full"]["quality_kept_interval"]
        return high - low

    assert width([str(number) for number in group]) > 2.5 * width([""] * NUM_SAMPLES)


def test_exact_matches_have_the_interval_of_a_share():
    metrics = {control.name: [] if control in LISTED else {} for control in ALL}
    metrics |= {name: [{}, {}] for name in LEVELS}
    scored = scored_points()
    add_intervals(metrics, resampled(scored))
    for point, scores in zip(metrics["routed"], scored[3:5], strict=True):
        share = scores.scores["exact_match"].mean()
        assert 0.1 < share < 0.9
        half_width = 1.96 * np.sqrt(share * (1 - share) / NUM_SAMPLES)
        assert point["exact_match_interval"] == pytest.approx(
            [share - half_width, share + half_width], abs=0.2 * half_width
        )


def test_a_reference_that_answers_nothing_has_no_quality_to_keep():
    scored = [scores("reference", 0.0, 0, np.zeros(NUM_SAMPLES)), *scored_points()[1:]]
    points = resampled(scored)
    assert comparisons(points, SAVING)["gap_closed"]["at_point"]["share"] is None


def test_the_auc_of_the_router_leaves_unlabelled_tiles_out():
    p_compress = np.array([0.9, 0.1, 0.8, 0.2, 0.5, 0.6], np.float32)
    labels = np.array([0, 1, 0, 1, -1, -1], np.int8)
    tiles = EvaluatedTiles([(2,), (2,), (2,)], p_compress, None, label_N=labels)
    auc = router_auc(tiles, resampling(["", "", ""], [[]] * 3, 200, seed=0))
    assert auc["auc"] == 1.0 and auc["num_tiles"] == 4


def test_the_auc_ranks_tiles_that_are_almost_certainly_kept():
    p_compress = np.array([1e-9, 1e-8, 2e-8, 0.5], np.float32)
    tiles = EvaluatedTiles([(4,)], p_compress, None, label_N=np.array([1, 1, 0, 0], np.int8))
    assert router_auc(tiles, resampling([""], [[]], 10, seed=0))["auc"] == 1.0
