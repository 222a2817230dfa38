"""Put samples into packs with two budgets: equal costs, each pack a mixture of large and small samples."""

from heapq import heappop, heappush

import numpy as np

_TRIED = 8
"""Packs taken from the heap until all are searched: towards the end many of the cheapest have no room."""


def even_fit(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, tile_cost: int
) -> tuple[np.ndarray, int]:
    """Return (pack of every sample, int64 [n]; number of packs); every sample must fit into an empty pack.

    As many packs are opened as the budgets need at least. Samples are placed by size (the larger of their two
    shares of the budgets), large ones first. Each goes into the pack of least cost that has room for it, the
    first of several, and into a new one if none has. A sample costs its tokens, and `tile_cost` for each of
    its tiles. Samples of equal size keep their order.
    """
    tokens, tiles = tokens.astype(np.int64), tiles.astype(np.int64)
    num_packs = max(-(-int(tokens.sum()) // max_tokens), -(-int(tiles.sum()) // max_tiles))
    order = np.argsort(-np.maximum(tokens * max_tiles, tiles * max_tokens), kind="stable")
    packs = [0] * len(order)
    token_room, tile_room, cost = [max_tokens] * num_packs, [max_tiles] * num_packs, [0] * num_packs
    heap = [(0, pack) for pack in range(num_packs)]  # (cost, pack); an entry with another cost is out of date
    for sample, sample_tokens, sample_tiles in zip(
        order.tolist(), tokens[order].tolist(), tiles[order].tolist(), strict=True
    ):
        chosen: int | None = None
        full: list[tuple[int, int]] = []
        while heap and chosen is None and len(full) < _TRIED:
            entry = heappop(heap)
            pack_cost, pack = entry
            if pack_cost != cost[pack]:
                continue
            if token_room[pack] >= sample_tokens and tile_room[pack] >= sample_tiles:
                chosen = pack
            else:
                full.append(entry)
        if chosen is None and heap:
            with_room = (
                (cost[pack], pack)
                for pack in range(len(cost))
                if token_room[pack] >= sample_tokens and tile_room[pack] >= sample_tiles
            )
            chosen = min(with_room, default=(0, None))[1]
        if chosen is None:
            chosen = len(cost)
            token_room.append(max_tokens)
            tile_room.append(max_tiles)
            cost.append(0)
        packs[sample] = chosen
        token_room[chosen] -= sample_tokens
        tile_room[chosen] -= sample_tiles
        cost[chosen] += sample_tokens + tile_cost * sample_tiles
        for entry in full:
            heappush(heap, entry)
        heappush(heap, (cost[chosen], chosen))
    return np.array(packs, np.int64), len(cost)
