"""Batched greedy answers compared with the simplest possible loop."""

import pytest
from transformers import GenerationConfig

from tests.unit.vico.inference.conftest import MAX_NEW_TOKENS
from vico.inference.generation import greedy_answers


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_a_batch_answers_like_each_prompt_by_itself(case, expected, batch_tokens):
    tiles, prompts = case
    assert len({tuple(ids) for ids in expected}) == len(prompts)  # otherwise equality would prove nothing
    # An end of turn that some answers reach immediately, some later and some never.
    ends = max(range(320), key=lambda token: sum(ids.index(token) > 0 for ids in expected if token in ids))
    answers = greedy_answers(
        tiles, prompts, end_of_turn_id=ends, max_new_tokens=MAX_NEW_TOKENS, batch_tokens=batch_tokens
    )
    for answer, ids in zip(answers, expected, strict=True):
        assert answer.truncated == (ends not in ids)
        assert answer.ids.tolist() == (ids[: ids.index(ends)] if ends in ids else ids)
    assert {answer.truncated for answer in answers} == {True, False}


def test_the_generation_config_of_the_model_is_not_applied(case, expected):
    tiles, prompts = case
    tiles.model.base.generation_config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=5.0,
        min_new_tokens=5,
        suppress_tokens=list(range(300)),
    )
    answers = greedy_answers(
        tiles, prompts, end_of_turn_id=319, max_new_tokens=MAX_NEW_TOKENS, batch_tokens=10_000
    )
    assert [answer.ids.tolist() for answer in answers] == expected


def test_no_prompts_give_no_answers(case):
    assert greedy_answers(case[0], [], end_of_turn_id=1, max_new_tokens=3, batch_tokens=10) == []
