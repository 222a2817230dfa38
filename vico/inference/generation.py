"""Greedy answers of many prompts at once, through transformers' `generate`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vico.inference.tile_losses import EncodedTiles, TiledSequence, num_tokens


@dataclass(frozen=True)
class Answer:
    """Token ids of an answer without its end of turn, int64; `truncated` where no end of turn came in
    time.
    """

    ids: np.ndarray
    truncated: bool


@torch.no_grad()
def greedy_answers(
    tiles: EncodedTiles,
    prompts: Sequence[TiledSequence],
    *,
    end_of_turn_id: int,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[Answer]:
    """The most likely continuation of each prompt, token by token, up to its end of turn.

    Prompts of like length share a batch of at most `batch_tokens` padded tokens (a lone long prompt may
    exceed it); the answers are those that each prompt gets by itself. Settings of the model's own
    generation_config.json, such as sampling or penalties, are not applied.
    """
    config = _greedy(end_of_turn_id, max_new_tokens)
    answers: list[Answer | None] = [None] * len(prompts)
    for numbers in _batches(prompts, tiles.model.settings, max_new_tokens, batch_tokens):
        embeds_BLD, mask_BL = _left_padded(tiles.embeddings([prompts[n] for n in numbers]))
        new_ids = _generated(tiles, embeds_BLD, mask_BL, config)
        for n, ids in zip(numbers, new_ids.cpu().numpy(), strict=True):
            ends = np.flatnonzero(ids == end_of_turn_id)
            answers[n] = Answer(ids[: ends[0]] if len(ends) else ids, truncated=not len(ends))
    return answers


@torch.no_grad()
def streamed_answer(
    tiles: EncodedTiles,
    prompt: TiledSequence,
    *,
    end_of_turn_id: int,
    max_new_tokens: int,
    on_token: Callable[[int], bool],
) -> None:
    """The same continuation, told token by token: `on_token` gets each id, the end of turn included, as soon
    as it is known, and ends the answer by returning True.
    """
    embeds_BLD, mask_BL = _left_padded(tiles.embeddings([prompt]))
    config = _greedy(end_of_turn_id, max_new_tokens)
    _generated(tiles, embeds_BLD, mask_BL, config, StoppingCriteriaList([_EachToken(on_token)]))


class _EachToken(StoppingCriteria):
    """Hands on the newest id of a batch of one; generate() asks after every token whether to stop."""

    def __init__(self, on_token: Callable[[int], bool]):
        self.on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **unused: object) -> torch.Tensor:
        stop = self.on_token(int(input_ids[0, -1]))
        return torch.full((1,), stop, dtype=torch.bool, device=input_ids.device)


def _greedy(end_of_turn_id: int, max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn_id,
        pad_token_id=end_of_turn_id,
    )


def _generated(
    tiles: EncodedTiles,
    embeds_BLD: torch.Tensor,
    mask_BL: torch.Tensor,
    config: GenerationConfig,
    stopping: StoppingCriteriaList | None = None,
) -> torch.Tensor:
    """New ids int64 [B, up to max_new_tokens]."""
    base = tiles.model.base
    base.generation_config = config  # generate() fills what a given config leaves open from the model's own
    return base.generate(
        inputs_embeds=embeds_BLD, attention_mask=mask_BL, generation_config=config, stopping_criteria=stopping
    )


def _batches(prompts, settings, max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the prompts, longest first, grouped so that padding to the longest keeps to the budget."""
    lengths = [num_tokens(prompt, settings) + max_new_tokens for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda n: -lengths[n])
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def _left_padded(embeds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, D] with each prompt at the right end, and the mask int64 [B, L] of what is no padding."""
    longest = max(len(one) for one in embeds)
    padded_BLD = embeds[0].new_zeros(len(embeds), longest, embeds[0].shape[-1])
    mask_BL = torch.zeros(len(embeds), longest, dtype=torch.int64, device=padded_BLD.device)
    for b, one in enumerate(embeds):
        padded_BLD[b, longest - len(one) :] = one
        mask_BL[b, longest - len(one) :] = 1
    return padded_BLD, mask_BL
