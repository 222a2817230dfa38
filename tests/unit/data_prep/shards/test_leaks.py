"""Samples with a picture that is also in another split."""

import pyarrow as pa

from data_prep.shards.leaks import leaked_lines

A, B, C = (bytes([number]) * 32 for number in range(3))
A_LIKE = A[:8] + b"x" * 24  # the same first bytes


def index_rows(first_line: int, *rows: tuple[str, list[bytes]]) -> pa.Table:
    """Return index rows with the given splits and pictures on consecutive lines."""
    return pa.table(
        {
            "line": pa.array(range(first_line, first_line + len(rows)), pa.int64()),
            "split": pa.array([split for split, _ in rows], pa.string()),
            "image_sha256": pa.array([pictures for _, pictures in rows], pa.list_(pa.binary(32))),
        }
    )


def leaked(*tables: pa.Table) -> dict[int, frozenset[int]]:
    return leaked_lines(lambda: iter(tables))


def test_a_picture_stays_in_the_split_furthest_from_training():
    shards = [
        index_rows(0, ("train", [A]), ("train", [A, B]), ("test", [C]), ("calib", [])),
        index_rows(4, ("test", [A]), ("calib", [B]), ("calib", [C, A])),
        index_rows(0, ("train", [C]), ("test", [C])),
    ]
    assert leaked(*shards) == {0: frozenset({0, 1}), 1: frozenset({6}), 2: frozenset({0})}


def test_nothing_leaks_when_every_picture_is_in_one_split():
    assert leaked(index_rows(0, ("train", [A]), ("train", [A, B]), ("test", [C]), ("test", []))) == {}
    assert leaked(index_rows(0)) == {} and leaked() == {}


def test_pictures_that_share_the_beginning_of_a_digest_are_different():
    assert leaked(index_rows(0, ("train", [A]), ("test", [A_LIKE]))) == {}
