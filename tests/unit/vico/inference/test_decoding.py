"""Prompts that are decoded together, which come and go, compared with each prompt alone."""

import numpy as np
import pytest
import torch

from tests.unit.vico.inference.conftest import MAX_NEW_TOKENS
from vico.inference.decoding import Decoder, Row
from vico.inference.sampling import GREEDY, Sampler, Sampling, chosen_tokens


def embeddings(case) -> list[torch.Tensor]:
    tiles, prompts = case
    return [tiles.embeddings([prompt])[0] for prompt in prompts]


def started(decoder: Decoder, embeds_LD: torch.Tensor, sampling: Sampling = GREEDY) -> Row:
    row = decoder.reserve(len(embeds_LD) + MAX_NEW_TOKENS)
    row.start(embeds_LD, MAX_NEW_TOKENS, sampling)
    return row


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_rows_that_come_and_go_get_the_tokens_that_they_get_alone(case, expected, chunk_tokens):
    """A new prompt starts every third step, is read in pieces, and each third one is dropped midway."""
    decoder = Decoder(case[0].model, 10_000, 100, chunk_tokens)
    waiting = list(enumerate(embeddings(case)))
    ids: dict[int, list[int]] = {}
    numbers: dict[Row, int] = {}
    most_rows = step = 0
    while waiting or decoder.rows:
        if waiting and step % 3 == 0:
            number, embeds_LD = waiting.pop(0)
            numbers[started(decoder, embeds_LD)] = number
            ids[number] = []
        most_rows = max(most_rows, len(decoder.rows))
        for row, token in decoder.step():
            answer = ids[numbers[row]]
            answer.append(token.id)
            if len(answer) == (4 if numbers[row] % 3 == 1 else MAX_NEW_TOKENS):
                decoder.remove(row)
        step += 1
    assert most_rows > 3
    assert decoder.num_reserved == 0
    assert {n: len(answer) for n, answer in ids.items()} == {
        n: 4 if n % 3 == 1 else MAX_NEW_TOKENS for n in range(len(expected))
    }
    for number, answer in ids.items():
        assert answer == expected[number][: len(answer)]


def test_a_long_prompt_does_not_hold_up_the_answers_beside_it(case):
    long, short = sorted(embeddings(case), key=len)[::-7][:2]
    decoder = Decoder(case[0].model, 10_000, 100, chunk_tokens=8)
    first = started(decoder, short)
    while not decoder.step():
        pass
    second = started(decoder, long)
    assert len(long) > 3 * 8
    for _ in range(3):
        assert [row for row, _ in decoder.step()] == [first]
    assert second.num_unread == len(long) - 3 * 8


def test_a_row_that_only_holds_room_is_left_alone(case):
    [embeds_LD, *_] = embeddings(case)
    decoder = Decoder(case[0].model, cache_tokens=200, max_rows=2)
    row = decoder.reserve(150)
    assert decoder.step() == [] and decoder.num_reserved == 150
    assert decoder.fits(50) and not decoder.fits(51)
    with pytest.raises(ValueError, match="do not fit in a row of 150"):
        row.start(embeds_LD, 150)
    row.start(embeds_LD, 5)
    assert decoder.num_reserved == len(embeds_LD) + 5, "room that is not needed is given back"
    decoder.reserve(1)
    assert not decoder.fits(1), "rows are limited too"


def test_a_seed_gives_the_same_answer_beside_any_others(case):
    prompts = embeddings(case)
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=11)

    def answer(others: int) -> list[int]:
        decoder = Decoder(case[0].model, 10_000, 100)
        rows = [started(decoder, prompts[n + 1], Sampling(temperature=1.0, seed=n)) for n in range(others)]
        row = started(decoder, prompts[0], sampling)
        ids = []
        for _ in range(MAX_NEW_TOKENS):
            ids += [token.id for stepped, token in decoder.step() if stepped is row]
        assert len(rows) == others
        return ids

    assert answer(0) == answer(4)
    assert len(set(answer(0))) > 1


def test_tokens_are_drawn_with_the_probabilities_of_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])
    for sampling, kept in ((Sampling(1.0, 1.0), 5), (Sampling(0.5, 0.9), 2), (Sampling(2.0, 0.8), 3)):
        expected = (logits.double() / sampling.temperature).softmax(-1)
        expected[kept:] = 0
        sampler = Sampler(Sampling(sampling.temperature, sampling.top_p, seed=0))
        draws = np.bincount([sampler.drawn(logits) for _ in range(4000)], minlength=5) / 4000
        np.testing.assert_allclose(draws, (expected / expected.sum()).numpy(), atol=0.03)
        assert not draws[kept:].any()
    tiny = Sampler(Sampling(1e-6, 1.0, seed=0))
    assert {tiny.drawn(logits) for _ in range(50)} == {0}, "towards 0 it becomes greedy"
    for temperature in (1e-306, 1e-308, 5e-324):
        smallest = Sampler(Sampling(temperature, 1.0, seed=0))
        assert smallest.drawn(logits) == 0
        assert smallest.drawn(torch.tensor([0.1, 20.0, 0.3])) == 1
    least = Sampler(Sampling(2.0, 1e-9, seed=0))
    assert {least.drawn(logits) for _ in range(50)} == {0}, "one token is always left"


def test_a_negative_seed_draws_other_tokens_than_the_positive_one():
    logits = torch.zeros(1000)
    draws = [[Sampler(Sampling(1.0, 1.0, seed)).drawn(logits) for _ in range(2)] for seed in (3, -3, 3)]
    assert draws[0] == draws[2] != draws[1]


def test_logprobs_are_those_of_the_model_whatever_is_drawn():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0]])
    samplings = [Sampling(temperature=2.0, top_p=0.5, seed=1, top_logprobs=2), Sampling(top_logprobs=0)]
    first, second = chosen_tokens([Sampler(sampling) for sampling in samplings], logits)
    logprobs = logits.log_softmax(-1)
    assert first.logprob == pytest.approx(float(logprobs[0, first.id]))
    assert first.top == (
        (0, pytest.approx(float(logprobs[0, 0]))),
        (1, pytest.approx(float(logprobs[0, 1]))),
    )
    assert (second.id, second.top) == (1, ()) and second.logprob == pytest.approx(float(logprobs[1, 1]))
    assert chosen_tokens([Sampler(Sampling())], logits[:1])[0].logprob is None
