"""Greedy answers to many prompts at once, with the `generate` of transformers.

Shapes: B prompts of a batch, L tokens of the longest prompt, D language width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vico.inference.tile_losses import EncodedTiles, num_tokens
from vico.packing import TiledSequence
from vico.settings import ModelSettings


@dataclass(frozen=True)
class Answer:
    """Token ids of an answer without its end of turn, int64; `truncated` if no end of turn came in time."""

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
    """Return the answer to each prompt: the most likely token each time, up to the end of turn.

    Prompts of similar length share a batch of at most `batch_tokens` padded tokens (a single long prompt
    may exceed it). The answers are those that each prompt gets alone. Settings of the model's own
    generation_config.json, such as sampling or penalties, are not applied.
    """
    config = _greedy_config(end_of_turn_id, max_new_tokens)
    answers: dict[int, Answer] = {}
    for numbers in _batches(prompts, tiles.model.settings, max_new_tokens, batch_tokens):
        embeds_BLD, mask_BL = _left_padded(tiles.embeddings([prompts[n] for n in numbers]))
        new_ids = _generated_ids(tiles, embeds_BLD, mask_BL, config)
        for n, ids in zip(numbers, new_ids.cpu().numpy(), strict=True):
            ends = np.flatnonzero(ids == end_of_turn_id)
            answers[n] = Answer(ids[: ends[0]] if len(ends) else ids, truncated=not len(ends))
    return [answers[n] for n in range(len(prompts))]


@torch.no_grad()
def streamed_answer(
    tiles: EncodedTiles,
    prompt: TiledSequence,
    *,
    end_of_turn_id: int,
    max_new_tokens: int,
    on_token: Callable[[int], bool],
) -> None:
    """Generate the same answer and pass each id, the end of turn included, to `on_token` once it is known.

    `on_token` ends the answer by returning True.
    """
    embeds_BLD, mask_BL = _left_padded(tiles.embeddings([prompt]))
    config = _greedy_config(end_of_turn_id, max_new_tokens)
    _generated_ids(tiles, embeds_BLD, mask_BL, config, StoppingCriteriaList([_EachToken(on_token)]))


class _EachToken(StoppingCriteria):
    """Passes on the newest id of a batch of one: generate() asks after every token whether to stop."""

    def __init__(self, on_token: Callable[[int], bool]):
        self.on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **unused: object) -> torch.Tensor:
        stop = self.on_token(int(input_ids[0, -1]))
        return torch.full((1,), stop, dtype=torch.bool, device=input_ids.device)


def _greedy_config(end_of_turn_id: int, max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn_id,
        pad_token_id=end_of_turn_id,
    )


def _generated_ids(
    tiles: EncodedTiles,
    embeds_BLD: torch.Tensor,
    mask_BL: torch.Tensor,
    config: GenerationConfig,
    stopping: StoppingCriteriaList | None = None,
) -> torch.Tensor:
    """Return the new ids, int64 [B, up to max_new_tokens]."""
    base = tiles.model.base
    base.generation_config = config  # generate() fills fields that a config leaves open from the model's own
    # its declared type accepts no model class as `self`, and omits that ids are the default result
    return base.generate(  # type: ignore[misc, return-value]
        inputs_embeds=embeds_BLD, attention_mask=mask_BL, generation_config=config, stopping_criteria=stopping
    )


def _batches(
    prompts: Sequence[TiledSequence], settings: ModelSettings, max_new_tokens: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Yield numbers of prompts, longest first, in groups whose padded size fits the budget."""
    lengths = [num_tokens(prompt, settings) + max_new_tokens for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda n: -lengths[n])
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def _left_padded(embeds: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, L, D] with each prompt at the right end, and its mask int64 [B, L] (0 for padding)."""
    longest = max(len(prompt_LD) for prompt_LD in embeds)
    padded_BLD = embeds[0].new_zeros(len(embeds), longest, embeds[0].shape[-1])
    mask_BL = torch.zeros(len(embeds), longest, dtype=torch.int64, device=padded_BLD.device)
    for b, prompt_LD in enumerate(embeds):
        padded_BLD[b, longest - len(prompt_LD) :] = prompt_LD
        mask_BL[b, longest - len(prompt_LD) :] = 1
    return padded_BLD, mask_BL
