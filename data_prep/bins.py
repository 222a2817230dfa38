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
    fewest_tiles = int(tiles[tiles > 0].min(initial=max_tiles))
    packs = np.empty(len(order), np.int64)
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted; packs that another picture may fit
    full: list[tuple[int, int]] = []  # packs with too few tiles left for any picture
    tiles_left: list[int] = []
    for item, item_tokens, item_tiles in zip(
        order.tolist(), tokens[order].tolist(), tiles[order].tolist(), strict=True
    ):
        if item_tiles == 0 and full:
            room, full = sorted(room + full), []
        place = bisect_left(room, (item_tokens, -1))
        while place < len(room) and tiles_left[room[place][1]] < item_tiles:
            place += 1
        if place < len(room):
            tokens_left, pack = room.pop(place)
        else:
            tokens_left, pack = max_tokens, len(tiles_left)
            tiles_left.append(max_tiles)
        packs[item] = pack
        tiles_left[pack] -= item_tiles
        left = (tokens_left - item_tokens, pack)
        if item_tiles and tiles_left[pack] < fewest_tiles:
            full.append(left)
        else:
            insort(room, left)
    return packs, len(tiles_left)
