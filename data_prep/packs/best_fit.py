"""Put samples into packs with two budgets: best fit, large samples first."""

from bisect import bisect_left, insort

import numpy as np


def best_fit(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int
) -> tuple[np.ndarray, int]:
    """Return (pack of every sample, int64 [n]; number of packs); every sample must fit into an empty pack.

    Samples are placed by size (the larger of their two shares of the budgets), those with tiles first. Each
    goes into the pack with the least room for tokens that can still hold it. Samples of equal size keep
    their order.
    """
    size = np.maximum(tokens.astype(np.int64) * max_tiles, tiles.astype(np.int64) * max_tokens)
    order = np.lexsort((-size, tiles == 0))
    packs = np.empty(len(order), np.int64)
    num_packs = 0
    room: dict[int, list[tuple[int, int]]] = {}  # by tiles left: (tokens left, pack), sorted
    for sample, sample_tokens, sample_tiles in zip(
        order.tolist(), tokens[order].tolist(), tiles[order].tolist(), strict=True
    ):
        best: tuple[int, int] | None = None
        for tiles_left, candidates in room.items():
            if tiles_left >= sample_tiles:
                position = bisect_left(candidates, (sample_tokens, -1))
                if position < len(candidates) and (best is None or candidates[position] < best):
                    best, best_tiles, best_position = candidates[position], tiles_left, position
        if best is None:
            best, best_tiles = (max_tokens, num_packs), max_tiles
            num_packs += 1
        else:
            candidates = room[best_tiles]
            del candidates[best_position]
            if not candidates:
                del room[best_tiles]
        tokens_left, pack = best
        packs[sample] = pack
        insort(room.setdefault(best_tiles - sample_tiles, []), (tokens_left - sample_tokens, pack))
    return packs, num_packs
