"""Batched greedy answers compared with the simplest possible loop."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.inference.generation import greedy_answers
from vico.inference.tile_losses import EncodedTiles, encoded_tiles
from vico.packing import TiledSequence
from vico.prompt import load_prompt_format

SHAPES = [(3,), (1,), (2, 1), (), (4,), (1, 1, 1), (1,), (3, 3)]
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model whose answers vary, its tiles, and prompts with no, one and several pictures at mixed rates."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "m", tied=False)
    model = load_model(folder)
    model.add_compressed_connector(1)
    model.eval()
    with torch.no_grad():  # larger weights: the next token depends on all earlier ones
        for name, parameter in model.base.model.language_model.named_parameters():
            if "proj" in name:
                parameter.mul_(6)
    prompt_format, random = load_prompt_format(folder), np.random.default_rng(0)
    prompts, first = [], 0
    for n, shape in enumerate(SHAPES):
        turns = [{"from": "human", "value": "<image>" * len(shape) + "what is written here " * (1 + n % 3)}]
        skeleton = prompt_format.encode(turns, shape, add_generation_prompt=True)
        prompts.append(TiledSequence(skeleton, random.random(sum(shape)) < 0.5, first))
        first += sum(shape)
    pixels = random.standard_normal((first, 3, 56, 56)).astype(np.float32)
    return encoded_tiles(model, pixels, 8), prompts


@torch.no_grad()
def plain_loop(tiles: EncodedTiles, prompt: TiledSequence) -> list[int]:
    """Return greedy tokens of one prompt: a whole forward pass for each, no cache, padding or end."""
    model = tiles.model
    embeds = tiles.embeddings([prompt])[0].unsqueeze(0)
    ids: list[int] = []
    for _ in range(MAX_NEW_TOKENS):
        ids.append(int(model.base(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.base.model.get_input_embeddings()(torch.tensor([ids[-1:]]))], dim=1)
    return ids


@pytest.fixture(scope="module")
def expected(case):
    tiles, prompts = case
    return [plain_loop(tiles, prompt) for prompt in prompts]


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
