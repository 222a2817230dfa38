"""Validation metrics: over all answer tokens, and per source if there are several."""

import pytest

from stages.consistency.worker import kl_of_sums


def test_several_sources_are_reported_each_except_one_without_answers():
    sums = {"kl_sum": 6.0, "answer_tokens": 12.0}
    sums |= {"kl_sum/charts": 4.0, "answer_tokens/charts": 4.0, "kl_sum/text": 2.0, "answer_tokens/text": 8.0}
    sums |= {"kl_sum/none": 0.0, "answer_tokens/none": 0.0}
    expected = {"kl_full": 0.5, "kl_full/charts": 1.0, "kl_full/text": 0.25}
    assert kl_of_sums(sums, "kl_full") == pytest.approx(expected)


def test_a_single_source_is_not_reported_twice():
    sums = {"kl_sum": 6.0, "answer_tokens": 12.0, "kl_sum/a": 6.0, "answer_tokens/a": 12.0}
    assert kl_of_sums(sums, "kl_full") == {"kl_full": 0.5}
    assert kl_of_sums({"kl_sum": 0.0, "answer_tokens": 0.0}, "kl_full") == {}
