"""Samples with a picture that stands on another side of the split too."""

import pyarrow as pa

from data_prep.shards.leaks import leaked_lines
from data_prep.shards.write import ShardContent

A, B, C = (bytes([number]) * 32 for number in range(3))
A_LIKE = A[:8] + b"x" * 24  # the same first bytes


def content(first_line, *rows):
    table = pa.table(
        {
            "line": pa.array(range(first_line, first_line + len(rows)), pa.int64()),
            "split": pa.array([split for split, _ in rows], pa.string()),
            "image_sha256": pa.array([pictures for _, pictures in rows], pa.list_(pa.binary(32))),
        }
    )
    return ShardContent(table, [], {})


def leaked(*contents):
    return leaked_lines(lambda: iter(contents))


def test_a_picture_stays_on_the_side_that_is_furthest_from_training():
    shards = [
        content(0, ("train", [A]), ("train", [A, B]), ("test", [C]), ("calib", [])),
        content(4, ("test", [A]), ("calib", [B]), ("calib", [C, A])),
        content(0, ("train", [C]), ("test", [C])),
    ]
    assert leaked(*shards) == {0: frozenset({0, 1}), 1: frozenset({6}), 2: frozenset({0})}


def test_nothing_leaks_where_every_picture_has_one_side():
    assert leaked(content(0, ("train", [A]), ("train", [A, B]), ("test", [C]), ("test", []))) == {}
    assert leaked(content(0)) == {} and leaked() == {}


def test_pictures_that_share_the_beginning_of_a_digest_are_others():
    assert leaked(content(0, ("train", [A]), ("test", [A_LIKE]))) == {}
