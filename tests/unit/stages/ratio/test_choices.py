"""What the ratio stage compresses, which samples it looks at, and the medians of its losses."""

import time

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_prep.draws import chosen_rows
from data_prep.shards.folder import write_index
from data_prep.shards.index import SCHEMA
from data_prep.shards.names import INDEX_FILE
from data_prep.shards.write import ShardContent
from stages.evaluate.config import EvaluateConfig
from stages.ratio.actor import medians, rate_vectors, shards_of
from stages.ratio.config import RatioConfig

LOSSES = ("loss_full", "loss_compressed", "ratio")


def as_text(vectors) -> list[str]:
    return ["".join(str(int(flag)) for flag in vector) for vector in vectors]


def test_one_tile_at_a_time_after_the_full_rate():
    assert as_text(rate_vectors((2, 1), "tile")) == ["000", "100", "010", "001"]
    assert as_text(rate_vectors((1,), "tile")) == ["0", "1"]


def test_all_tiles_of_an_image_at_a_time():
    assert as_text(rate_vectors((2, 1), "image")) == ["000", "110", "001"]
    assert as_text(rate_vectors((3,), "image")) == ["000", "111"]


def test_a_smaller_choice_lies_within_a_larger_one():
    rows = np.arange(5, 500, 3)
    small, large = chosen_rows(rows, 20, 1), chosen_rows(rows, 60, 1)
    assert len(small) == 20 and set(small) <= set(large) <= set(rows) and (np.diff(large) > 0).all()
    assert chosen_rows(rows, 0, 1).tolist() == chosen_rows(rows, 999, 1).tolist() == rows.tolist()
    assert set(chosen_rows(rows, 20, 2)) != set(small)
    assert small.max() > 250  # drawn, not the first


def test_rows_that_cannot_be_used_leave_the_others_chosen():
    rows = np.arange(300)
    usable = rows % 4 != 0
    assert set(chosen_rows(rows, 100, 1)[usable[chosen_rows(rows, 100, 1)]]) <= set(
        chosen_rows(rows[usable], 100, 1)
    )


def empty_column(field: pa.Field, length: int) -> pa.Array:
    value = "" if pa.types.is_string(field.type) else [] if pa.types.is_list(field.type) else 0
    return pa.repeat(pa.scalar(value, field.type), length)


def write_shard_index(folder, shard, split, num_tiles):
    """An index of rows with an answer, of which only these columns say something."""
    known = {
        "shard": shard,
        "split": split,
        "num_tiles": num_tiles,
        "answer_tokens": np.ones(len(shard), int),
    }
    columns = [
        pa.array(known[field.name], field.type) if field.name in known else empty_column(field, len(shard))
        for field in SCHEMA
    ]
    write_index(folder / INDEX_FILE, [ShardContent(pa.Table.from_arrays(columns, schema=SCHEMA), [], {})])


def test_shards_hold_their_rows_in_one_pass_however_many_shards_there_are(tmp_path):
    shard = np.repeat(np.arange(100_000), 2)
    split = np.where(np.arange(200_000) % 4 < 2, "train", "test")
    num_tiles = np.where(np.arange(200_000) % 6 == 5, 0, 3)
    write_shard_index(tmp_path, shard, split, num_tiles)
    begun = time.process_time()
    found = shards_of(RatioConfig(splits=("train", "test"), max_samples=0, seed=1), tmp_path)
    assert time.process_time() - begun < 3
    assert [(one.shard, one.rows) for one in found[:4]] == [(0, (0, 1)), (1, (2, 3)), (2, (4,)), (3, (6, 7))]
    assert len(found) == 100_000


def test_medians_are_those_of_each_kind_and_of_all():
    kinds = ["b", "a", "b", "b", "c"]
    table = pa.table({"kind": kinds, **{n: [1.0, 2.0, 5.0, 3.0, 9.0] for n in LOSSES}})
    chunks = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    of = {"b": (3, 3.0), "a": (1, 2.0), "c": (1, 9.0)}
    expected = {k: {"tiles": n, **dict.fromkeys(LOSSES, value)} for k, (n, value) in of.items()}
    assert medians(chunks) == {"all": {"tiles": 5, **dict.fromkeys(LOSSES, 3.0)}, "by_kind": expected}
    assert list(medians(chunks)["by_kind"]) == ["a", "b", "c"]
    assert medians(chunks.slice(0, 0)) == {"all": {"tiles": 0}, "by_kind": {}}


def test_medians_by_kind_take_one_pass_however_many_kinds_there_are():
    """A kind is whatever a row says; a pass for each would be kinds times tiles."""
    kinds = [f"{n % 5_000}" for n in range(500_000)]
    table = pa.table({"kind": kinds, **{n: np.arange(500_000.0) for n in LOSSES}})
    begun = time.process_time()
    assert len(medians(table)["by_kind"]) == 5_000
    assert time.process_time() - begun < 4


@pytest.mark.parametrize(
    "config, values, message",
    [
        (RatioConfig, {"splits": ("calib", "test")}, "needs train"),
        (RatioConfig, {"splits": ("train", "train")}, "no split twice"),
        (EvaluateConfig, {"shares": (0.5, 1.0)}, "between 0 and 1"),
        (EvaluateConfig, {"controls": ("rendom",)}, "random"),
    ],
)
def test_configs_refuse_what_cannot_be_meant(config, values, message):
    with pytest.raises(ValidationError, match=message):
        config(**values)
