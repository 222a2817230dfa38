"""Packs for validation and measuring: every sample once, in index order, all tiles at one rate."""

from collections.abc import Iterator

import numpy as np

from data_prep.packs.pack import Pack, PackBudget
from data_prep.shards.index import IndexColumns


def fixed_packs(index: IndexColumns, budget: PackBudget, *, compressed: bool) -> Iterator[Pack]:
    """Yield packs of neighbouring samples within the budget; `repeat` is ignored.

    Raises UserError if a sample does not fit into an empty pack.
    """
    budget.check(index)
    tokens = budget.sample_tokens(index)
    for number, (start, end) in enumerate(_runs(tokens, index.num_tiles, budget)):
        yield Pack(
            number=number,
            rows=index.rows[start:end],
            copies=np.zeros(end - start, np.int64),
            compressed=[np.full(int(num_tiles), compressed) for num_tiles in index.num_tiles[start:end]],
            num_tokens=int(tokens[start:end].sum()),
            num_tiles=int(index.num_tiles[start:end].sum()),
        )


def _runs(tokens: np.ndarray, tiles: np.ndarray, budget: PackBudget) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of runs of samples that fit into a pack together, in order."""
    start = run_tokens = run_tiles = 0
    for i, (sample_tokens, sample_tiles) in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        too_many_tokens = run_tokens + sample_tokens > budget.reference_tokens
        if i > start and (too_many_tokens or run_tiles + sample_tiles > budget.tiles):
            yield start, i
            start, run_tokens, run_tiles = i, 0, 0
        run_tokens, run_tiles = run_tokens + sample_tokens, run_tiles + sample_tiles
    if start < len(tokens):
        yield start, len(tokens)
