"""Greedy answers of many prompts at once, through transformers' `generate`."""

# B prompts of a batch, L longest prompt, D language width

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig

from vico.rates import EncodedTiles, TiledSequence, num_tokens


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
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn_id,
        pad_token_id=end_of_turn_id,
    )
    answers: list[Answer | None] = [None] * len(prompts)
    for numbers in _batches(prompts, tiles.model.settings, max_new_tokens, batch_tokens):
        embeds_BLD, mask_BL = _left_padded(tiles.embeddings([prompts[n] for n in numbers]))
        base = tiles.model.base
        base.generation_config = (
            config  # generate() fills what a given config leaves open from the model's own
        )
        new_ids = base.generate(inputs_embeds=embeds_BLD, attention_mask=mask_BL, generation_config=config)
        for n, ids in zip(numbers, new_ids.cpu().numpy(), strict=True):
            ends = np.flatnonzero(ids == end_of_turn_id)
            answers[n] = Answer(ids[: ends[0]] if len(ends) else ids, truncated=not len(ends))
    return answers


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
