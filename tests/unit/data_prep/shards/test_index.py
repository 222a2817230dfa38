"""The index of written shards: rows, planning columns, row groups."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.shards.folder import contents, write_index
from data_prep.shards.index import load_index
from data_prep.shards.names import shard_name
from stages.shard.repair_summary import all_tables
from tests.table_readers import assert_opens_everywhere
from vico.errors import UserError

NUM_ROWS = 24


def test_the_index_has_one_row_per_sample_in_order(folder):
    index = load_index(folder)
    assert len(index) == NUM_ROWS
    assert [index.row(n)["key"] for n in range(NUM_ROWS)] == [f"good-{n:08d}" for n in range(NUM_ROWS)]
    assert [index.row(n)["shard"] for n in (0, 9, 10, 23)] == [0, 0, 1, 2]
    with pytest.raises(IndexError, match="row 24 of 24"):
        index.row(24)


def test_columns_of_the_splits_cover_the_index(folder):
    index = load_index(folder)
    splits = {name: index.columns(name) for name in ("train", "calib", "test")}
    assert sorted(np.concatenate([c.rows for c in splits.values()]).tolist()) == list(range(NUM_ROWS))
    for name, columns in splits.items():
        assert len(columns) > 0
        for i, row in enumerate(columns.rows.tolist()):
            index_row = index.row(row)
            assert index_row["split"] == name and columns.name(i) == index_row["key"]
            tiles = columns.image_tiles[columns.image_starts[i] : columns.image_starts[i + 1]]
            assert tiles.tolist() == index_row["tiles"] and columns.num_tiles[i] == sum(index_row["tiles"])
    table = index.table(["key", "kind"], "calib")
    assert table.column_names == ["key", "kind", "row"]
    assert table["row"].to_pylist() == splits["calib"].rows.tolist()


def test_the_index_opens_in_pandas_polars_and_duckdb(folder):
    rows = assert_opens_everywhere(folder / "index.parquet")
    index = load_index(folder)
    assert rows == [index.row(n) for n in range(NUM_ROWS)]
    digests = [digest for row in rows for digest in row["image_sha256"]]
    assert digests and {len(digest) for digest in digests} == {32}


def test_an_older_index_with_digests_of_fixed_size_is_read_and_repaired(folder, copied, tmp_path):
    """Digests were lists of binary(32), which pandas cannot read."""
    table = pq.read_table(folder / "index.parquet")
    position = table.schema.get_field_index("image_sha256")
    digests = table["image_sha256"].cast(pa.list_(pa.binary(32)))
    older = table.set_column(position, pa.field("image_sha256", digests.type, nullable=False), digests)
    pq.write_table(older, copied / "index.parquet", row_group_size=7)
    index, new_index = load_index(copied), load_index(folder)
    assert [index.row(n) for n in range(NUM_ROWS)] == [new_index.row(n) for n in range(NUM_ROWS)]
    new_tables = [content.table for content in contents(copied, 3)]
    write_index(tmp_path / "index.parquet", all_tables(copied / "index.parquet", new_tables))
    assert assert_opens_everywhere(tmp_path / "index.parquet") == 2 * table.to_pylist()


def test_an_index_can_be_sent_to_another_process(folder):
    assert pickle.loads(pickle.dumps(load_index(folder))).row(3) == load_index(folder).row(3)


def test_a_missing_index_or_one_of_another_schema_is_refused(copied, tmp_path):
    with pytest.raises(UserError, match=r"index.parquet does not exist"):
        load_index(tmp_path)
    table = pq.read_table(copied / "index.parquet")
    pq.write_table(table.replace_schema_metadata({b"vico.schema": b"99"}), copied / "index.parquet")
    with pytest.raises(UserError, match="has schema 99, this version reads 2"):
        load_index(copied)


def test_a_tar_whose_size_changed_is_found_before_the_index_is_written(copied):
    with open(copied / shard_name(2), "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"00002.tar has \d+ bytes but was written with"):
        list(contents(copied, 3))


def test_row_groups_have_equal_size_and_rows_are_found_in_them(copied, monkeypatch):
    monkeypatch.setattr("data_prep.shards.folder._ROWS_PER_GROUP", 7)
    monkeypatch.setattr("data_prep.shards.index._CACHED_ROW_GROUPS", 2)
    whole = load_index(copied)
    expected = [whole.row(n) for n in range(NUM_ROWS)]
    write_index(copied / "index.parquet", (content.table for content in contents(copied, 3)))
    metadata = pq.ParquetFile(copied / "index.parquet").metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [7, 7, 7, 3]
    index = load_index(copied)
    order = [23, 0, 7, 6, 14, 21, 1, *range(NUM_ROWS)]
    assert [index.row(n) for n in order] == [expected[n] for n in order]
