"""Greedy answers to many prompts at once.

Shapes: L tokens of a prompt, D language width.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vico.inference.decoding import Decoder, Row
from vico.inference.tile_losses import EncodedTiles, num_tokens
from vico.packing import TiledSequence

_MAX_ROWS = 64
"""Prompts that are decoded at once: beyond it, more of them gain nothing on a CPU."""


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

    Prompts that are decoded at once have at most `batch_tokens` tokens with their answers (a single long
    prompt may exceed it). The answers are those that each prompt gets alone, except for rounding. Settings of
    the model's own generation_config.json, such as sampling or penalties, are not applied.
    """
    decoder = Decoder(tiles.model, cache_tokens=batch_tokens, max_rows=_MAX_ROWS)
    waiting = deque(range(len(prompts)))
    numbers: dict[Row, int] = {}
    ids: list[list[int]] = [[] for _ in prompts]
    truncated = [False] * len(prompts)
    while waiting or decoder.rows:
        while waiting and _fits(decoder, tiles, prompts[waiting[0]], max_new_tokens):
            number = waiting.popleft()
            [embeds_LD] = tiles.embeddings([prompts[number]])
            row = decoder.reserve(len(embeds_LD) + max_new_tokens)
            row.start(embeds_LD, max_new_tokens)
            numbers[row] = number
        for row, token in decoder.step():
            answer, is_end = ids[numbers[row]], token.id == end_of_turn_id
            if not is_end:
                answer.append(token.id)
            if is_end or len(answer) == max_new_tokens:
                truncated[numbers[row]] = not is_end
                decoder.remove(row)
    return [
        Answer(np.asarray(answer, np.int64), was_cut) for answer, was_cut in zip(ids, truncated, strict=True)
    ]


def _fits(decoder: Decoder, tiles: EncodedTiles, prompt: TiledSequence, max_new_tokens: int) -> bool:
    return not decoder.rows or decoder.fits(num_tokens(prompt, tiles.model.settings) + max_new_tokens)
