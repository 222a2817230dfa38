"""Rows that share pictures have one side of the split, whatever the shards, and lose no row by it."""

import hashlib
import random
from collections import defaultdict

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards.leaks import leaked_lines
from data_prep.shards.picture_sides import picture_sides
from data_prep.shards.split import Shares, side, split_of

SHARES = Shares(0.2, 0.2)
HELDOUT = frozenset({"held"})


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def index_rows(rows: list[tuple[str, list[int]]], first_line: int = 0) -> pa.Table:
    """Return index rows of (group, numbers of the pictures), each with the split it draws by itself.

    The group "held" stands for a held-out row.
    """
    splits = [
        "test"
        if group == "held"
        else split_of(SHARES, key=str(first_line + n), group=group, pictures=[digest(p) for p in pictures])
        for n, (group, pictures) in enumerate(rows)
    ]
    return pa.table(
        {
            "line": pa.array(range(first_line, first_line + len(rows)), pa.int64()),
            "split": pa.array(splits, pa.string()),
            "group": pa.array(["" if group == "held" else group for group, _ in rows], pa.string()),
            "source": pa.array(["held" if group == "held" else "mine" for group, _ in rows], pa.string()),
            "image_sha256": pa.array([[digest(p) for p in ps] for _, ps in rows], pa.list_(pa.binary(32))),
        }
    )


def sharded(rows: list[tuple[str, list[int]]], rows_per_shard: int) -> list[pa.Table]:
    return [
        index_rows(rows[first : first + rows_per_shard], first)
        for first in range(0, max(len(rows), 1), rows_per_shard)
    ]


def settled(rows: list[tuple[str, list[int]]], rows_per_shard: int = 1000) -> list[str]:
    """Return the split of every row once all shards are known."""
    tables = sharded(rows, rows_per_shard)
    sides = picture_sides(lambda: iter(tables), HELDOUT)
    return [split for table in tables for split in sides.settled(table)["split"].to_pylist()]


def connected(rows: list[tuple[str, list[int]]]) -> list[set[int]]:
    """Return the sets of rows without a group that shared pictures connect, found one row at a time."""
    sets: list[tuple[set[int], set[int]]] = []  # rows, pictures
    for n, (group, pictures) in enumerate(rows):
        if group or not pictures:
            continue
        touched = [component for component in sets if component[1].intersection(pictures)]
        merged = ({n}.union(*(t[0] for t in touched)), set(pictures).union(*(t[1] for t in touched)))
        sets = [component for component in sets if component not in touched] + [merged]
    return [component for component, _ in sets]


free = st.tuples(st.just(""), st.lists(st.integers(0, 30), max_size=4))
grouped = st.tuples(st.sampled_from(["a", "b", "held"]), st.lists(st.integers(0, 30), max_size=3))
rows_lists = st.lists(st.one_of(free, free, grouped), max_size=25)


@given(rows_lists, st.integers(1, 9))
def test_connected_rows_have_one_side_and_the_shards_do_not_matter(rows, rows_per_shard):
    splits = settled(rows)
    assert settled(rows, rows_per_shard) == splits
    of_picture: dict[int, set[str]] = defaultdict(set)
    for (group, pictures), split in zip(rows, splits, strict=True):
        for picture in pictures:
            if not group:
                of_picture[picture].add(split)
    assert all(len(sides) == 1 for sides in of_picture.values()), "a picture is on one side"
    drawn = index_rows(rows)["split"].to_pylist()
    for component in connected(rows):
        (split,) = {splits[n] for n in component}
        alone = {rows[n][1][0] for n in component if len(set(rows[n][1])) == 1}
        candidates = alone or {picture for n in component for picture in rows[n][1]}
        assert split == side(SHARES, "picture", min(map(digest, candidates)))
        if len(alone) <= 1:
            unmoved = [n for n in component if len(set(rows[n][1])) == 1]
            assert all(splits[n] == drawn[n] for n in unmoved), "rows of one picture keep their side"
    stated = [n for n, (group, pictures) in enumerate(rows) if group or not pictures]
    assert [splits[n] for n in stated] == [drawn[n] for n in stated], "groups and keys decide alone"


@given(rows_lists)
def test_settled_rows_stay_as_they_are(rows):
    """A stage that resumes may see rows that were settled before."""
    table = index_rows(rows)
    sides = picture_sides(lambda: [table], HELDOUT)
    once = sides.settled(table)
    assert sides.settled(once) == once
    assert picture_sides(lambda: [once], HELDOUT).settled(once) == once
    pairs = zip(table["split"].to_pylist(), once["split"].to_pylist(), strict=True)
    assert sides.moved(table) == {n: after for n, (before, after) in enumerate(pairs) if before != after}


@given(st.lists(free, max_size=25))
def test_no_row_is_lost_without_groups_and_held_out_rows(rows):
    tables = sharded(rows, 4)
    sides = picture_sides(lambda: iter(tables), HELDOUT)
    assert leaked_lines(lambda: map(sides.settled, tables)) == {}


@pytest.mark.parametrize("num_pictures", [1, 2, 3, 4])
def test_rows_that_share_no_picture_keep_the_side_they_draw(num_pictures):
    rows = [("", [num_pictures * n + k for k in range(num_pictures)]) for n in range(2000)]
    splits = settled(rows, 300)
    assert splits == index_rows(rows)["split"].to_pylist()
    assert splits.count("calib") / 2000 == pytest.approx(0.2, abs=0.04)
    assert splits.count("test") / 2000 == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("order", ["falling", "rising", "random"])
def test_a_long_chain_of_rows_has_one_side(order):
    """Row n shares a picture with the rows before and after it, as in frames of a film."""
    links = sorted(range(20_001), key=digest, reverse=order == "falling")
    if order == "random":
        random.Random(0).shuffle(links)
    rows = [("", [links[n], links[n + 1]]) for n in range(20_000)]
    assert set(settled(rows, 1000)) == {side(SHARES, "picture", min(map(digest, links)))}


def test_the_largest_set_of_connected_rows_is_counted():
    rows = [("", [0, n]) for n in range(1, 13)] + [("", [n]) for n in range(12, 100)]
    sides = picture_sides(lambda: [index_rows(rows)], HELDOUT)
    assert (sides.num_connected, sides.num_rows) == (13, 100), "12 of picture 0, and one of picture 12 alone"
    apart = [("", [2 * n, 2 * n + 1]) for n in range(100)]
    assert picture_sides(lambda: [index_rows(apart)], HELDOUT).num_connected == 0


def test_a_picture_given_twice_in_a_row_is_one_picture():
    table = index_rows([("", [5, 5]), ("", [5, 1]), ("", [1, 2])])
    sides = picture_sides(lambda: [table], HELDOUT)
    assert set(sides.settled(table)["split"].to_pylist()) == {side(SHARES, "picture", digest(5))}
