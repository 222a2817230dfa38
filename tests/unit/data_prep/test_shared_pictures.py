"""Pictures that stand on several sides of the split are counted."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.shard_folder import num_shared_pictures

A, B, C = (bytes([number]) * 32 for number in range(3))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("train", [A]), ("train", [A, B]), ("test", [C]), ("calib", [])], 0),
        ([("train", [A]), ("test", [A, B]), ("calib", [B]), ("test", [C])], 2),
        ([], 0),
    ],
)
def test_a_picture_in_two_splits_is_counted_once(tmp_path, rows, expected):
    table = pa.table(
        {
            "split": pa.array([split for split, _ in rows], pa.string()),
            "image_sha256": pa.array([pictures for _, pictures in rows], pa.list_(pa.binary(32))),
        }
    )
    pq.write_table(table, tmp_path / "index.parquet")
    assert num_shared_pictures(tmp_path / "index.parquet") == expected
