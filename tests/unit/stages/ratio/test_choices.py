"""What the ratio stage compresses, which samples it uses, and the medians of its losses."""

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_prep.draws import chosen_rows
from data_prep.shards.folder import write_index
from data_prep.shards.index import SCHEMA
from data_prep.shards.names import INDEX_FILE
from stages.evaluate.config import EvaluateConfig
from stages.ratio.actor import medians, rate_vectors, shards_of
from stages.ratio.config import RatioConfig
from tests.growth import cpu_growth

LOSSES = ("loss_full", "loss_compressed", "ratio")


def as_text(vectors) -> list[str]:
    return ["".join(str(int(flag)) for flag in vector) for vector in vectors]


def test_one_tile_at_a_time_after_the_full_rate():
    assert as_text(rate_vectors((2, 1), "tile")) == ["000", "100", "010", "001"]
    assert as_text(rate_vectors((1,), "tile")) == ["0", "1"]


def test_all_tiles_of_an_image_at_a_time():
    assert as_text(rate_vectors((2, 1), "image")) == ["000", "110", "001"]
    assert as_text(rate_vectors((3,), "image")) == ["000", "111"]


def test_a_smaller_choice_is_part_of_a_larger_one():
    rows = np.arange(5, 500, 3)
    small, large = chosen_rows(rows, 20, 1), chosen_rows(rows, 60, 1)
    assert len(small) == 20 and set(small) <= set(large) <= set(rows) and (np.diff(large) > 0).all()
    assert chosen_rows(rows, 0, 1).tolist() == chosen_rows(rows, 999, 1).tolist() == rows.tolist()
    assert set(chosen_rows(rows, 20, 2)) != set(small)
    assert small.max() > 250  # drawn, not the first


def test_unusable_rows_do_not_change_the_choice_of_others():
    rows = np.arange(300)
    usable = rows % 4 != 0
    assert set(chosen_rows(rows, 100, 1)[usable[chosen_rows(rows, 100, 1)]]) <= set(
        chosen_rows(rows[usable], 100, 1)
    )


def empty_column(field: pa.Field, length: int) -> pa.Array:
    value = "" if pa.types.is_string(field.type) else [] if pa.types.is_list(field.type) else 0
    return pa.repeat(pa.scalar(value, field.type), length)


def write_shard_index(folder, shard, split, num_tiles):
    """Write an index of rows with an answer; all other columns are empty."""
    values = {
        "shard": shard,
        "split": split,
        "num_tiles": num_tiles,
        "answer_tokens": np.ones(len(shard), int),
    }
    columns = [
        pa.array(values[field.name], field.type) if field.name in values else empty_column(field, len(shard))
        for field in SCHEMA
    ]
    write_index(folder / INDEX_FILE, [pa.Table.from_arrays(columns, schema=SCHEMA)])


def write_small_shards(folder, num_shards: int) -> None:
    """Write an index of shards with two samples each; every sixth sample has no tile."""
    sample = np.arange(2 * num_shards)
    split = np.where(sample % 4 < 2, "train", "test")
    folder.mkdir(exist_ok=True)
    write_shard_index(folder, sample // 2, split, np.where(sample % 6 == 5, 0, 3))


def test_shards_get_their_usable_rows(tmp_path):
    write_small_shards(tmp_path, 1000)
    shards = shards_of(RatioConfig(splits=("train", "test"), max_samples=0, seed=1), tmp_path)
    assert [(shard.shard, shard.rows) for shard in shards[:4]] == [
        (0, (0, 1)),
        (1, (2, 3)),
        (2, (4,)),
        (3, (6, 7)),
    ]
    assert len(shards) == 1000


def test_rows_of_shards_need_one_pass_for_any_number_of_shards(tmp_path):
    """One pass per shard would be quadratic."""
    for num_shards in (5_000, 40_000):
        write_small_shards(tmp_path / str(num_shards), num_shards)
    config = RatioConfig(splits=("train", "test"), max_samples=0, seed=1)
    assert cpu_growth(lambda num_shards: shards_of(config, tmp_path / str(num_shards)), 5_000) < 24


def test_medians_are_those_of_each_kind_and_of_all_tiles():
    kinds = ["b", "a", "b", "b", "c"]
    table = pa.table({"kind": kinds, **{n: [1.0, 2.0, 5.0, 3.0, 9.0] for n in LOSSES}})
    chunks = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    of = {"b": (3, 3.0), "a": (1, 2.0), "c": (1, 9.0)}
    expected = {k: {"tiles": n, **dict.fromkeys(LOSSES, value)} for k, (n, value) in of.items()}
    assert medians(chunks) == {"all": {"tiles": 5, **dict.fromkeys(LOSSES, 3.0)}, "by_kind": expected}
    assert list(medians(chunks)["by_kind"]) == ["a", "b", "c"]
    assert medians(chunks.slice(0, 0)) == {"all": {"tiles": 0}, "by_kind": {}}


def test_medians_by_kind_need_one_pass_for_any_number_of_kinds():
    """Users name the kinds, so there may be many; one pass per kind would be quadratic."""

    def table(num_kinds: int) -> pa.Table:
        kinds = [f"{n % num_kinds}" for n in range(20 * num_kinds)]
        return pa.table({"kind": kinds, **{name: np.arange(20.0 * num_kinds) for name in LOSSES}})

    tables = {num_kinds: table(num_kinds) for num_kinds in (1_000, 8_000)}
    assert len(medians(tables[1_000])["by_kind"]) == 1_000
    assert cpu_growth(lambda num_kinds: medians(tables[num_kinds]), 1_000) < 24


@pytest.mark.parametrize(
    "config, values, message",
    [
        (RatioConfig, {"splits": ("calib", "test")}, "needs train"),
        (RatioConfig, {"splits": ("train", "train")}, "no split twice"),
        (EvaluateConfig, {"shares": (0.5, 1.0)}, "between 0 and 1"),
        (EvaluateConfig, {"controls": ("rendom",)}, "random"),
    ],
)
def test_configs_refuse_values_that_make_no_sense(config, values, message):
    with pytest.raises(ValidationError, match=message):
        config(**values)
