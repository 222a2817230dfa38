"""Bootstrap over samples and groups, its intervals, and the weighted AUC."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from stages.evaluate.resampling import MIN_GROUPS, interval, ranked_tiles, resampling

MEAN_OF_CLIPPED = 0.5899
"""Mean of a normal variable (0.6, 0.3) clipped to 0 to 1."""


def test_samples_of_a_group_are_drawn_together_and_samples_without_a_group_alone():
    groups = ["a", "", "a", "", *(f"b{n}" for n in range(MIN_GROUPS))]
    draws = resampling(groups, [[]] * len(groups), 200, seed=1)
    assert (draws.unit, draws.num_units, draws.num_groups) == ("group", MIN_GROUPS + 3, MIN_GROUPS + 1)
    values = np.zeros((len(groups), 2))
    values[[0, 2], 0] = 1.0
    values[[1, 3, 4], 1] = 10, 100, 1000
    sums = draws.sums(values)
    assert (sums[:, 0] % 2 == 0).all() and len(np.unique(sums[:, 1])) > 20
    for counts, (first, second) in zip(draws.counts(), sums, strict=True):
        assert counts.sum() == draws.num_units
        by_sample = counts[draws.unit_S]
        assert (first, second) == tuple(by_sample @ values)


def test_few_groups_are_counted_but_samples_are_drawn():
    draws = resampling(["a", "b", "a", ""], [[b"1"], [b"2"], [b"3"], []], 100, seed=1)
    assert (draws.unit, draws.num_units, draws.num_groups) == ("sample", 4, 2)
    assert sorted(draws.unit_S) == [0, 1, 2, 3]


def test_samples_that_pictures_connect_are_drawn_together():
    pictures = [[b"1"], [b"2"], [b"2", b"3"], [], [b"3"], [b"1", b"1"], []]
    draws = resampling([""] * 7, pictures, 50, seed=1)
    assert (draws.unit, draws.num_units) == ("picture", 4)
    assert len(set(draws.unit_S[[0, 5]])) == len(set(draws.unit_S[[1, 2, 4]])) == 1
    assert len(set(draws.unit_S[[0, 1, 3, 6]])) == 4
    # a group decides alone: the split, too, keeps its samples together whatever their pictures
    groups = [f"g{n}" for n in range(MIN_GROUPS)]
    both = resampling([*groups, "", ""], [[b"1"]] * (MIN_GROUPS + 2), 50, seed=1)
    assert (both.unit, both.num_units, both.num_groups) == ("group", MIN_GROUPS + 1, MIN_GROUPS)


def test_intervals_cover_the_mean_if_several_questions_are_about_a_picture():
    """Answers to one picture are alike, so its questions tell less than as many of different pictures."""
    random = np.random.default_rng(4)
    num_pictures, num_questions, covered = 60, 8, []
    pictures = [[bytes([n])] for n in range(num_pictures) for _ in range(num_questions)]
    for seed in range(100):
        chance = np.clip(random.normal(0.6, 0.3, num_pictures), 0, 1)
        right = random.random((num_pictures, num_questions)) < chance[:, None]
        draws = resampling([""] * right.size, pictures, 200, seed)
        low, high = interval(draws.sums(right.reshape(-1, 1).astype(float))[:, 0] / right.size)
        covered.append(low <= MEAN_OF_CLIPPED <= high)
    assert np.mean(covered) > 0.87  # one question as a unit covers it in 0.74


def test_draws_depend_on_the_seed_alone():
    names = [str(n) for n in range(30)]
    first, same, other = (list(resampling(names, [[]] * 30, 5, seed).counts()) for seed in (3, 3, 4))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_the_interval_of_a_mean_agrees_with_the_normal_distribution():
    values = np.random.default_rng(0).normal(5, 2, 1000)
    means = resampling([""] * 1000, [[]] * 1000, 2000, seed=0).sums(values[:, None])[:, 0] / 1000
    low, high = interval(means)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_undefined_resamples_widen_the_interval_or_leave_none():
    values = np.arange(1000.0)
    assert interval(values) == [24.0, 975.0]
    values[500:510] = np.nan
    assert interval(values) == [14.0, 985.0]
    values[500:560] = np.nan
    assert interval(values) is None


def test_the_auc_agrees_with_scikit_learn_also_with_ties_and_weights():
    random = np.random.default_rng(2)
    keep = random.random(300) < 0.4
    score = np.round(random.random(300) + 0.3 * keep, 1)
    unit = random.integers(20, size=300)
    ranked = ranked_tiles(unit, keep, score)
    assert ranked.auc(np.ones(20)) == pytest.approx(roc_auc_score(keep, score))
    for counts in resampling([str(n) for n in range(20)], [[]] * 20, 5, seed=0).counts():
        expected = roc_auc_score(keep, score, sample_weight=counts[unit])
        assert ranked.auc(counts) == pytest.approx(expected)
    assert np.isnan(ranked_tiles(unit, np.ones(300, bool), score).auc(np.ones(20)))
