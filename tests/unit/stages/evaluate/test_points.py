"""Which tiles each point of the evaluation compresses."""

from collections import Counter

import numpy as np
import pytest

from stages.evaluate.points import EvaluatedTiles, operating_points

SHAPES = [(3,), (1,), (1,), (3,), (2, 1), (), (1,), (3,), (5,), (2, 1)]
NUM_TILES = sum(sum(shape) for shape in SHAPES)
CONTROLS = ("random", "shuffled", "oracle")


def tiles(with_ratio: bool = True) -> EvaluatedTiles:
    random = np.random.default_rng(1)
    ratio = random.lognormal(size=NUM_TILES) if with_ratio else None
    return EvaluatedTiles(SHAPES, random.random(NUM_TILES).astype(np.float32), ratio)


def points(found: EvaluatedTiles, seed: int = 0, thresholds=(0.8, 0.5, 0.2)) -> dict[str, list]:
    by_entry: dict[str, list] = {}
    for point in operating_points(found, thresholds, 0.5, 0.0, CONTROLS, 3, seed):
        by_entry.setdefault(point.entry, []).append(point)
    return by_entry


def test_ends_and_router():
    found = tiles()
    by_entry = points(found)
    assert not by_entry["full"][0].replicates[0].any() and by_entry["compressed"][0].replicates[0].all()
    for point, threshold in zip(by_entry["routed"], (0.8, 0.5, 0.2), strict=True):
        assert point.threshold == threshold
        assert (point.replicates[0] == (found.p_compress_N >= threshold)).all()


def test_the_served_rule_keeps_a_tile_of_every_prompt():
    found = tiles()
    (served,) = points(found)["served"]
    decisions = zip(found.by_sample(served.replicates[0]), found.by_sample(found.p_compress_N), strict=True)
    for flags, probability in decisions:
        if len(flags):
            lowest = probability == probability.min()
            assert (flags == ((probability >= 0.5) & ~lowest)).all()
    assert served.replicates[0].any()


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_spend_exactly_the_routers_tokens(control):
    by_entry = points(tiles())
    for routed, point in zip(by_entry["routed"], by_entry[control], strict=True):
        assert point.threshold == routed.threshold
        assert {int(flags.sum()) for flags in point.replicates} == {int(routed.replicates[0].sum())}


def test_drawn_controls_differ_by_replicate_and_seed_and_can_be_repeated():
    one, same, other = points(tiles()), points(tiles()), points(tiles(), seed=1)
    for control in ("random", "shuffled"):
        replicates = one[control][1].replicates
        assert len(replicates) == 3 and len({flags.tobytes() for flags in replicates}) == 3
        assert all((a == b).all() for a, b in zip(replicates, same[control][1].replicates, strict=True))
        assert any((a != b).any() for a, b in zip(replicates, other[control][1].replicates, strict=True))
    assert len(one["oracle"][0].replicates) == 1


def test_shuffled_hands_whole_decisions_to_samples_of_the_same_shape():
    found = tiles()
    by_entry = points(found)

    def vectors(flags_N):
        shaped = zip(SHAPES, found.by_sample(flags_N), strict=True)
        return Counter((shape, flags.tobytes()) for shape, flags in shaped)

    for routed, shuffled in zip(by_entry["routed"], by_entry["shuffled"], strict=True):
        for flags in shuffled.replicates:
            assert vectors(flags) == vectors(routed.replicates[0])


def test_the_oracle_compresses_the_smallest_ratios():
    found = tiles()
    for point in points(found)["oracle"]:
        flags = point.replicates[0]
        assert found.ratio_N[flags].max() < found.ratio_N[~flags].min()


def test_without_ratios_there_is_no_oracle():
    assert "oracle" not in points(tiles(with_ratio=False))
