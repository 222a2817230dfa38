"""Putting samples into packs with two budgets: best fit, large samples first."""

from bisect import bisect_left, insort

import numpy as np


def best_fit(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int
) -> tuple[np.ndarray, int]:
    """(pack of every item as int64 [n], number of packs); every item must fit an empty pack.

    Items go in by size (the larger of their two shares of the budgets), those with tiles before those
    without, each into the pack with the least room for tokens that still holds it. Items of equal size keep
    their order.
    """
    size = np.maximum(tokens.astype(np.int64) * max_tiles, tiles.astype(np.int64) * max_tokens)
    order = np.lexsort((-size, tiles == 0))
    packs = np.empty(len(order), np.int64)
    num_packs = 0
    room: dict[int, list[tuple[int, int]]] = {}  # by tiles left: (tokens left, pack), sorted
    for item, item_tokens, item_tiles in zip(
        order.tolist(), tokens[order].tolist(), tiles[order].tolist(), strict=True
    ):
        best: tuple[int, int] | None = None
        for tiles_left, candidates in room.items():
            if tiles_left >= item_tiles:
                place = bisect_left(candidates, (item_tokens, -1))
                if place < len(candidates) and (best is None or candidates[place] < best):
                    best, best_tiles, best_place = candidates[place], tiles_left, place
        if best is None:
            best, best_tiles = (max_tokens, num_packs), max_tiles
            num_packs += 1
        else:
            candidates = room[best_tiles]
            del candidates[best_place]
            if not candidates:
                del room[best_tiles]
        tokens_left, pack = best
        packs[item] = pack
        insort(room.setdefault(best_tiles - item_tiles, []), (tokens_left - item_tokens, pack))
    return packs, num_packs
