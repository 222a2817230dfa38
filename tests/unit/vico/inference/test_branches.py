"""Every beginning that rate vectors share is computed once, in rows of a limited size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vico.inference.branches import RatedSample, plan_of, rows_of
from vico.packing import TiledSequence, packed_row
from vico.prompt import Skeleton
from vico.settings import ModelSettings

IMAGE = 5
SETTINGS = ModelSettings(
    tile_size=56,
    tokens_full=4,
    tokens_compressed=1,
    vision_tokens=16,
    image_token_id=IMAGE,
    min_tiles=1,
    max_tiles=12,
    use_thumbnail=True,
    vocab_size=320,
)


def skeleton_of(pattern: str) -> Skeleton:
    """Return a skeleton: t is a tile, q a token of a question, a one of an answer."""
    ids = np.array([IMAGE if letter == "t" else 10 + number for number, letter in enumerate(pattern)])
    return Skeleton(ids, np.array([letter == "a" for letter in pattern]), pattern.count("t"))


def distinct_beginnings(sample: RatedSample) -> int:
    """Return the number of different beginnings of all sequences: the tokens that have to be computed."""
    beginnings = set()
    for rates in sample.rates:
        flags = iter(rates.tolist())
        tokens: tuple[object, ...] = ()
        for token in sample.skeleton.ids.tolist():
            flag = next(flags) if token == IMAGE else None
            width = 1 if flag is None else SETTINGS.tokens_compressed if flag else SETTINGS.tokens_full
            for part in range(width):
                tokens = (*tokens, (token, flag, part))
                beginnings.add(tokens)
    return len(beginnings)


def positions_seen(branches, number: int) -> list[tuple[int, int]]:
    """Return (branch, position) of all tokens that a branch sees."""
    parts = {**branches[number].seen, number: branches[number].num_tokens}
    return [
        (branch, branches[branch].sequence.start + offset)
        for branch, count in parts.items()
        for offset in range(count)
    ]


@given(
    st.lists(st.sampled_from(["q", "t", "tt", "a", "aa"]), min_size=1, max_size=9),
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
)
@hypothesis_settings(deadline=None, max_examples=150)
def test_no_token_is_computed_twice_and_each_sequence_is_whole(parts, seed, num_vectors):
    skeleton = skeleton_of("q" + "".join(parts) + "qa")
    random = np.random.default_rng(seed)
    rates = [random.random(skeleton.num_tiles) < 0.5 for _ in range(num_vectors)]
    sample = RatedSample(skeleton, 3, rates)
    plan = plan_of([sample], SETTINGS)
    assert sum(branch.num_tokens for branch in plan.branches) == distinct_beginnings(sample)
    for vector, number in zip(rates, plan.branch_of[0], strict=True):
        branch = plan.branches[number]
        assert (branch.sequence.compressed == vector).all()
        length = int(TiledSequence(skeleton, vector, 3).token_starts(SETTINGS)[-1])
        assert [position for _, position in positions_seen(plan.branches, number)] == list(range(length))
        own = packed_row([branch.sequence], SETTINGS)
        assert own.lengths == (branch.num_tokens,)
        assert branch.num_earlier_answers + own.num_answers[0] == skeleton.num_answer_tokens


def test_one_tile_at_a_time_shares_the_tiles_before_it():
    skeleton = skeleton_of("qtttqaa")
    rates = [np.zeros(3, bool), *np.eye(3, dtype=bool)]
    branches = plan_of([RatedSample(skeleton, 0, rates)], SETTINGS).branches
    # the whole at the full rate, then from the last tile to the first: itself and what follows it
    assert [branch.num_tokens for branch in branches] == [16, 1 + 3, 1 + 4 + 3, 1 + 8 + 3]
    assert [dict(branch.seen) for branch in branches] == [{}, {0: 9}, {0: 5}, {0: 1}]


@pytest.mark.parametrize("row_tokens", [1, 5, 9, 20, 10_000])
def test_rows_are_small_and_keep_what_later_rows_see(row_tokens):
    random = np.random.default_rng(0)
    samples = [
        RatedSample(skeleton_of(pattern), 0, [random.random(pattern.count("t")) < 0.6 for _ in range(7)])
        for pattern in ("qttttqa", "qtaqttaa", "qqa", "qtqa")
    ]
    branches = plan_of(samples, SETTINGS).branches
    rows = list(rows_of(branches, row_tokens))
    assert [number for row in rows for number in row.branches] == list(range(len(branches)))
    kept: dict[int, int] = {}
    for row in rows:
        sizes = [branches[number].num_tokens for number in row.branches]
        assert sum(sizes) <= row_tokens or len(sizes) == 1
        there = {**kept, **{number: branches[number].num_tokens for number in row.branches}}
        for number in row.branches:
            assert all(count <= there[branch] for branch, count in branches[number].seen.items())
        assert all(count <= there[branch] for branch, count in row.kept.items())
        kept = dict(row.kept)
    assert kept == {}
