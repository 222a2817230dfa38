"""Which tiles each point of the evaluation compresses."""

from collections import Counter

import numpy as np
import pytest

from stages.evaluate.config import EvaluateConfig
from stages.evaluate.points import EvaluatedTiles, measured_controls, operating_points

SHAPES = [(3,), (1,), (1,), (3,), (2, 1), (), (1,), (3,), (5,), (2, 1)]
NUM_TILES = sum(sum(shape) for shape in SHAPES)
CONTROLS = ("random", "shuffled", "blind_oracle", "oracle")
THRESHOLDS = (0.8, 0.5, 0.2)
CALIBRATED = 0.5


def tiles(with_ratio: bool = True) -> EvaluatedTiles:
    random = np.random.default_rng(1)
    ratio = random.lognormal(size=NUM_TILES) if with_ratio else None
    p_compress = random.random(NUM_TILES).astype(np.float32)
    blind = random.lognormal(size=NUM_TILES)
    blind[:4] = np.nan  # the first two samples have one question
    return EvaluatedTiles(SHAPES, p_compress, ratio, blind_ratio_N=blind if with_ratio else None)


def points(evaluated: EvaluatedTiles, seed: int = 0, relative_threshold: float = 0.0) -> dict[str, list]:
    """Return the points by the name of their control."""
    config = EvaluateConfig(
        seed=seed, controls=CONTROLS, num_replicates=3, relative_threshold=relative_threshold
    )
    by_control: dict[str, list] = {}
    for point in operating_points(evaluated, config, THRESHOLDS, CALIBRATED):
        by_control.setdefault(point.control.name, []).append(point)
    return by_control


def by_sample(evaluated: EvaluatedTiles, point):
    """Return (decisions, probabilities to compress) of each sample with tiles."""
    decisions = evaluated.by_sample(point.replicates[0])
    pairs = zip(decisions, evaluated.by_sample(evaluated.p_compress_N), strict=True)
    return [(flags, probability) for flags, probability in pairs if len(flags)]


def test_ends_and_router():
    evaluated = tiles()
    by_control = points(evaluated)
    assert not by_control["full"][0].replicates[0].any() and by_control["compressed"][0].replicates[0].all()
    for point, threshold in zip(by_control["routed"], THRESHOLDS, strict=True):
        assert point.threshold == threshold
        assert (point.replicates[0] == (evaluated.p_compress_N >= threshold)).all()


def test_the_served_rule_keeps_a_tile_of_every_prompt():
    evaluated = tiles()
    (served,) = points(evaluated)["served"]
    for flags, probability in by_sample(evaluated, served):
        lowest = probability == probability.min()
        assert (flags == ((probability >= CALIBRATED) & ~lowest)).all()
    assert served.replicates[0].any()


def test_the_relative_threshold_compresses_only_tiles_above_that_quantile_of_their_prompt():
    evaluated = tiles()
    at_zero, at_half = (points(evaluated, relative_threshold=relative) for relative in (0.0, 0.5))
    (served,) = at_half["served"]
    for flags, probability in by_sample(evaluated, served):
        above = probability > np.quantile(probability, 0.5)
        assert (flags == ((probability >= CALIBRATED) & above)).all()
        assert flags.sum() <= len(flags) / 2
    assert 0 < served.replicates[0].sum() < at_zero["served"][0].replicates[0].sum()
    for name in at_zero.keys() - {"served"}:
        for before, after in zip(at_zero[name], at_half[name], strict=True):
            assert np.array_equal(before.replicates, after.replicates), "only the served rule reads it"


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_use_exactly_the_routers_tokens(control):
    by_control = points(tiles())
    for routed, point in zip(by_control["routed"], by_control[control], strict=True):
        assert point.threshold == routed.threshold
        assert {int(flags.sum()) for flags in point.replicates} == {int(routed.replicates[0].sum())}


def test_random_controls_differ_by_replicate_and_seed_and_can_be_repeated():
    first, same, other = points(tiles()), points(tiles()), points(tiles(), seed=1)
    for control in ("random", "shuffled"):
        replicates = first[control][1].replicates
        assert len(replicates) == 3 and len({flags.tobytes() for flags in replicates}) == 3
        assert all((a == b).all() for a, b in zip(replicates, same[control][1].replicates, strict=True))
        assert any((a != b).any() for a, b in zip(replicates, other[control][1].replicates, strict=True))
    assert len(first["oracle"][0].replicates) == 1


def test_shuffled_gives_whole_decisions_to_samples_of_the_same_shape():
    evaluated = tiles()
    by_control = points(evaluated)

    def vectors(flags_N):
        shaped = zip(SHAPES, evaluated.by_sample(flags_N), strict=True)
        return Counter((shape, flags.tobytes()) for shape, flags in shaped)

    for routed, shuffled in zip(by_control["routed"], by_control["shuffled"], strict=True):
        for flags in shuffled.replicates:
            assert vectors(flags) == vectors(routed.replicates[0])


def test_the_oracle_compresses_the_smallest_ratios():
    evaluated = tiles()
    for point in points(evaluated)["oracle"]:
        flags = point.replicates[0]
        assert evaluated.ratio_N[flags].max() < evaluated.ratio_N[~flags].min()


def test_without_ratios_there_is_no_oracle():
    assert "oracle" not in points(tiles(with_ratio=False))


def test_the_blind_oracle_ranks_by_other_questions_and_leaves_tiles_without_any_to_the_router():
    evaluated = tiles()
    by_control = points(evaluated)
    known = np.isfinite(evaluated.blind_ratio_N)
    for name, ratio in (("blind_oracle", evaluated.blind_ratio_N), ("seeing_oracle", evaluated.ratio_N)):
        for routed, point in zip(by_control["routed"], by_control[name], strict=True):
            routed_N, flags = routed.replicates[0], point.replicates[0]
            assert (flags[~known] == routed_N[~known]).all()
            assert flags[known].sum() == routed_N[known].sum()
            assert ratio[known & flags].max() < ratio[known & ~flags].min()


def test_without_other_questions_there_is_no_blind_oracle():
    by_control = points(tiles(with_ratio=False))
    assert not {"blind_oracle", "seeing_oracle"} & by_control.keys()


def test_the_seeing_oracle_comes_with_the_blind_one():
    names = [
        control.name for control in measured_controls(EvaluateConfig(seed=0, controls=("blind_oracle",)))
    ]
    assert names == ["blind_oracle", "seeing_oracle"]


def test_fewer_tiles_keep_all_of_them_at_the_full_rate():
    evaluated = tiles()
    counts_S = np.minimum(evaluated.num_tiles_S, 2)
    evaluated = EvaluatedTiles(SHAPES, evaluated.p_compress_N, None, retiled_S={2: counts_S})
    (point,) = points(evaluated)["fewer_tiles"]
    (flags,) = point.replicates
    assert point.max_tiles == 2 and point.threshold is None and not flags.any()
    assert [len(part) for part in point.by_sample(evaluated, flags)] == counts_S.tolist()
