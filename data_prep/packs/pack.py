"""One pack: its samples with their rates, and the budgets that they must fit."""

from dataclasses import dataclass

import numpy as np

from data_prep.shards.index import IndexColumns
from vico.errors import UserError


@dataclass(frozen=True, eq=False)
class Pack:
    """Samples for one micro-step: `rows`, `copies` int64 [S], and `compressed`, bool [T] per sample.

    `copies` is the number of times that a sample came before in the epoch; `num_tokens` are reference
    tokens. A pack without rows fills up the last step of an epoch.
    """

    number: int
    rows: np.ndarray
    copies: np.ndarray
    compressed: list[np.ndarray]
    num_tokens: int = 0
    num_tiles: int = 0


@dataclass(frozen=True)
class PackBudget:
    """The most that one pack may hold: reference tokens (all tiles at the full rate) and tiles.

    `tokens_full` is the number of reference tokens per tile.
    """

    reference_tokens: int
    tiles: int
    tokens_full: int

    def sample_tokens(self, index: IndexColumns) -> np.ndarray:
        """Return the reference tokens of every sample, int64 [n]."""
        return index.text_tokens.astype(np.int64) + index.num_tiles.astype(np.int64) * self.tokens_full

    def check(self, index: IndexColumns) -> None:
        """Raise UserError, naming the largest sample, if a sample does not fit into an empty pack."""
        tokens = self.sample_tokens(index)
        for field, budget, sizes in (
            ("reference_tokens_per_pack", self.reference_tokens, tokens),
            ("tiles_per_pack", self.tiles, index.num_tiles),
        ):
            largest = int(np.argmax(sizes)) if len(sizes) else None
            if largest is not None and sizes[largest] > budget:
                raise UserError(
                    f"{field}={budget} is too small a pack for {index.name(largest)} ({int(tokens[largest])} "
                    f"reference tokens, {int(index.num_tiles[largest])} tiles); raise {field} to at least "
                    f"{int(sizes[largest])}, or lower shard.max_tokens or shard.max_tiles"
                )
