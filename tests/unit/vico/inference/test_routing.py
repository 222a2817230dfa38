"""Our routing rule and the published one."""

import torch

from vico.inference.routing import absolute_rule, published_rule

P = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.95])


def test_the_absolute_rule_decides_each_tile_alone():
    together = absolute_rule(P, 0.7)
    assert together.tolist() == [False, True, True, True, True]  # equality compresses
    assert torch.cat([absolute_rule(tile, 0.7) for tile in P.split(1)]).equal(together)


def test_the_published_rule_needs_both_thresholds():
    above_median = [False, True, False, False, True]  # the median is 0.7
    assert published_rule(P, 0.5, 0.0).tolist() == above_median
    assert published_rule(P, 0.5, 0.92).tolist() == [False, False, False, False, True]


def test_the_published_rule_keeps_a_tile_of_every_call():
    assert published_rule(P, 0.0, 0.0).tolist() == [False, True, True, True, True]
    for tile in P.split(1):
        assert published_rule(tile, 0.0, 0.0).tolist() == [False]
    assert published_rule(P[:0], 0.0, 0.0).tolist() == []
