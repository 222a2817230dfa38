"""Samples in packs of equal cost, within both budgets."""

import numpy as np
import pytest

from data_prep.packs.even_fit import even_fit

COST = 100


def by_search(tokens: list[int], tiles: list[int], max_tokens: int, max_tiles: int) -> list[int]:
    """The same by its definition: of all packs with room, the first of least cost."""
    num_packs = max(-(-sum(tokens) // max_tokens), -(-sum(tiles) // max_tiles))
    held: list[list[int]] = [[] for _ in range(num_packs)]

    def has_room(pack: list[int], sample: int) -> bool:
        inside = [*pack, sample]
        return sum(tokens[s] for s in inside) <= max_tokens and sum(tiles[s] for s in inside) <= max_tiles

    size = [max(t * max_tiles, n * max_tokens) for t, n in zip(tokens, tiles, strict=True)]
    for sample in sorted(range(len(tokens)), key=lambda s: -size[s]):
        costs = [
            (sum(tokens[s] + COST * tiles[s] for s in pack), number)
            for number, pack in enumerate(held)
            if has_room(pack, sample)
        ]
        if not costs:
            held.append([])
        held[min(costs)[1] if costs else -1].append(sample)
    pack_of = {sample: number for number, pack in enumerate(held) for sample in pack}
    return [pack_of[sample] for sample in range(len(tokens))]


@pytest.mark.parametrize("seed", range(12))
def test_each_sample_is_in_the_cheapest_pack_with_room(seed):
    random = np.random.default_rng(seed)
    num = int(random.integers(1, 250))
    tiles = random.choice([0, 0, 1, 3, 7], num)
    tokens = 16 * tiles + random.integers(1, (40, 120)[seed % 2], num)
    packs, num_packs = even_fit(tokens, tiles, 240, 8 + seed, COST)
    assert packs.tolist() == by_search(tokens.tolist(), tiles.tolist(), 240, 8 + seed)
    assert num_packs == packs.max() + 1
    assert np.bincount(packs, tokens).max() <= 240 and np.bincount(packs, tiles).max() <= 8 + seed


def test_packs_are_full_and_cost_the_same():
    random = np.random.default_rng(0)
    tiles = random.choice([0, 1, 3, 5, 7, 9, 13], 4000)
    tokens = 256 * tiles + random.integers(40, 400, 4000)
    packs, num_packs = even_fit(tokens, tiles, 32_768, 96, COST)
    least = max(tokens.sum() / 32_768, tiles.sum() / 96)
    assert num_packs <= 1.02 * least + 1
    costs = np.bincount(packs, tokens + COST * tiles)
    assert costs.std() < 0.05 * costs.mean()
