"""The learning rate that belongs to an update, and the warning about another one."""

import pytest

from stages.consistency.config import ConsistencyConfig
from stages.consistency.rate_rule import rate_by_rule, rate_warning

BILLION = 10**9


def config(packs, tokens=32768, rate=8e-5):
    return ConsistencyConfig(
        seed=0,
        packs_per_step=packs,
        reference_tokens_per_pack=tokens,
        optimizer={"learning_rate": rate},
    )


def test_the_published_rate_belongs_to_512_packs_and_follows_the_square_root():
    assert rate_by_rule(config(512)) == pytest.approx(8e-5)
    assert rate_by_rule(config(8)) == pytest.approx(1e-5)
    assert rate_by_rule(config(16, tokens=16384)) == rate_by_rule(config(8))  # the same tokens per update


def test_a_rate_far_above_the_rule_is_named_with_the_one_that_fits():
    warning = rate_warning(config(8), BILLION)
    assert "consistency.optimizer.learning_rate=8e-05 is 8.0 times" in warning
    assert "set 1.0e-05, or more packs_per_step" in warning
    assert rate_warning(config(8, rate=rate_by_rule(config(8))), BILLION) is None
    assert rate_warning(config(512), BILLION) is None
    assert rate_warning(config(4, rate=3e-4), 4 * 10**6) is None  # the demo's model
