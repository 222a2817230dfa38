"""Decoding of many prompts together: each step is one packed row through the language model.

A step takes the newest token of every answer, and a piece of the prompts that are not read yet (chunked
prefill). Prompts come and go between steps. `vico/inference/generation.py` answers a list of prompts with it,
and the engine of `vico serve` the requests of its clients.

Shapes: L tokens of a prompt or a packed row, B answers that get a token in a step, D language width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vico.inference.sampling import GREEDY, Sampler, Sampling, Token, chosen_tokens
from vico.model.internvl import VicoModel
from vico.model.row_cache import RowCache

CHUNK_TOKENS = 512
"""Prompt tokens of one step. A long prompt delays the answers beside it by no more than a step of so many."""


@dataclass(eq=False)
class Row:
    """One prompt in the decoder: its embeddings [L, D], until they are read, and its newest token.

    A row without embeddings only holds room, for a prompt that is still being prepared.
    """

    cache: RowCache
    embeds_LD: torch.Tensor | None = None
    sampler: Sampler = field(default_factory=lambda: Sampler(GREEDY))
    newest: int | None = None

    def start(self, embeds_LD: torch.Tensor, max_new_tokens: int, sampling: Sampling = GREEDY) -> None:
        """Give the row its prompt; the next steps read it and then give its tokens.

        Room that prompt and answer do not need is given back. Raises ValueError if they need more.
        """
        num_tokens = len(embeds_LD) + max_new_tokens
        if num_tokens > self.cache.capacity:
            raise ValueError(f"{num_tokens} tokens do not fit in a row of {self.cache.capacity}")
        self.cache.capacity = num_tokens
        self.embeds_LD, self.sampler = embeds_LD, Sampler(sampling)

    @property
    def num_unread(self) -> int:
        """The number of prompt tokens that no step has read."""
        return 0 if self.embeds_LD is None else len(self.embeds_LD) - self.cache.num_cached


@dataclass
class Decoder:
    """Decodes up to `max_rows` prompts at once, whose prompts and answers have at most `cache_tokens`
    together.

    Every row has room for its whole answer from the start, so no answer is ever interrupted for want of
    memory. Answers do not depend on the other rows, except for rounding.
    """

    model: VicoModel
    cache_tokens: int
    max_rows: int
    chunk_tokens: int = CHUNK_TOKENS
    rows: list[Row] = field(default_factory=list)
    """In the order in which they came; unread prompts are read in this order."""

    @property
    def num_reserved(self) -> int:
        """The number of cached tokens for which rows have room."""
        return sum(row.cache.capacity for row in self.rows)

    def fits(self, num_tokens: int) -> bool:
        """Return whether another row of so many tokens, prompt and answer together, can be added now."""
        return len(self.rows) < self.max_rows and self.num_reserved + num_tokens <= self.cache_tokens

    def reserve(self, num_tokens: int) -> Row:
        """Add a row with room for so many tokens; `Row.start` gives it a prompt."""
        row = Row(RowCache(num_tokens))
        self.rows.append(row)
        return row

    def remove(self, row: Row) -> None:
        """Forget a row and free its cache, at the end of its answer or before."""
        self.rows.remove(row)

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Token]]:
        """Run one step, and return the next token of each row whose prompt is read to its end."""
        pieces = list(self._pieces())
        if not pieces:
            return []
        device = self.model.lm_head.weight.device
        positions = [range(row.cache.num_cached, row.cache.num_cached + len(piece)) for row, piece in pieces]
        for row, piece in pieces:
            row.cache.num_new = len(piece)
        embeds_BLD = torch.cat([piece for _, piece in pieces]).unsqueeze(0)
        hidden_BLD = self.model.base.model.language_model(
            inputs_embeds=embeds_BLD,
            attention_mask=embeds_BLD.new_zeros(1, 1, 1, 1),  # for the same reason as in packed training
            position_ids=torch.tensor([[n for part in positions for n in part]], device=device),
            use_cache=False,
            row_caches=[row.cache for row, _ in pieces],
        ).last_hidden_state
        ends = torch.tensor([len(piece) for _, piece in pieces]).cumsum(0) - 1
        for row, piece in pieces:
            row.cache.num_cached += len(piece)
        complete = [n for n, (row, _) in enumerate(pieces) if not row.num_unread]
        if not complete:
            return []
        rows = [pieces[n][0] for n in complete]
        logits_BV = self.model.lm_head(hidden_BLD[0, ends[complete].to(device)])
        tokens = chosen_tokens([row.sampler for row in rows], logits_BV)
        for row, token in zip(rows, tokens, strict=True):
            row.newest = token.id
            row.embeds_LD = None  # the cache holds what is needed of the prompt
        return list(zip(rows, tokens, strict=True))

    def _pieces(self) -> Iterator[tuple[Row, torch.Tensor]]:
        """Yield the rows of the next step, each with its new embeddings."""
        answering = [row for row in self.rows if row.newest is not None]
        if answering:
            newest = torch.tensor([row.newest for row in answering], device=self.model.lm_head.weight.device)
            yield from zip(
                answering, self.model.base.model.get_input_embeddings()(newest).split(1), strict=True
            )
        room = self.chunk_tokens
        for row in self.rows:
            num_tokens = min(row.num_unread, room)
            if row.embeds_LD is not None and num_tokens:
                start = row.cache.num_cached
                room -= num_tokens
                yield row, row.embeds_LD[start : start + num_tokens]
