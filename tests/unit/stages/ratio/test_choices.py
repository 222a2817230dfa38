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
from stages.finite import check_finite
from stages.ratio.actor import medians
from stages.ratio.config import RatioConfig
from stages.ratio.isolation import random_masks, rate_vectors, tile_losses
from stages.ratio.samples import shards_of
from tests.growth import cpu_growth
from vico.errors import UserError

LOSSES = ("loss_full", "loss_compressed", "ratio")


def as_text(vectors) -> list[str]:
    return ["".join(str(int(flag)) for flag in vector) for vector in vectors]


TILE, IMAGE = RatioConfig(seed=1), RatioConfig(seed=1, isolation="image")
RANDOM = RatioConfig(seed=1, isolation="random", masks=12, ridge=1e-9)


def test_one_tile_at_a_time_after_the_full_rate():
    assert as_text(rate_vectors((2, 1), "k", TILE)) == ["000", "100", "010", "001"]
    assert as_text(rate_vectors((1,), "k", TILE)) == ["0", "1"]
    full, compressed = tile_losses((2, 1), [], np.array([0.1, 1.0, 2.0, 3.0]), TILE)
    assert full.tolist() == [0.1] * 3 and compressed.tolist() == [1.0, 2.0, 3.0]


def test_all_tiles_of_an_image_at_a_time():
    assert as_text(rate_vectors((2, 1), "k", IMAGE)) == ["000", "110", "001"]
    assert as_text(rate_vectors((3,), "k", IMAGE)) == ["000", "111"]
    full, compressed = tile_losses((2, 1), [], np.array([0.1, 1.0, 2.0]), IMAGE)
    assert full.tolist() == [0.1] * 3 and compressed.tolist() == [1.0, 1.0, 2.0]


def test_random_masks_are_a_function_of_sample_and_config():
    masks = random_masks(5, "k", RANDOM)
    assert (random_masks(5, "k", RANDOM) == masks).all()
    others = [random_masks(5, "l", RANDOM), random_masks(5, "k", RANDOM.model_copy(update={"seed": 2}))]
    assert not any((other == masks).all() for other in others)
    vectors = rate_vectors((3, 2), "k", RANDOM)
    assert not vectors[0].any() and (np.stack(vectors[1:]) == masks).all()
    losses = 1.0 + np.stack(vectors) @ np.arange(5.0)
    full, compressed = tile_losses((3, 2), vectors, losses, RANDOM)
    assert full.tolist() == [1.0] * 5, "what other tiles cost is not in it"
    np.testing.assert_allclose(compressed - full, np.arange(5.0), atol=1e-6)


@pytest.mark.parametrize("num_tiles", [1, 3, 13])
def test_tiles_of_equal_cost_have_equal_ratios_whatever_the_number_of_tiles(num_tiles):
    vectors = rate_vectors((num_tiles,), "k", RatioConfig(seed=1, isolation="random", masks=40, ridge=1e-9))
    losses = 0.05 + 0.2 * np.stack(vectors).sum(1)
    full, compressed = tile_losses((num_tiles,), vectors, losses, RANDOM)
    np.testing.assert_allclose(compressed / full, 5.0, rtol=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.667])
@pytest.mark.parametrize("num_tiles", [1, 2, 3, 7, 12, 40])
def test_random_masks_compress_each_tile_equally_often(num_tiles, share):
    config = RatioConfig(seed=3, isolation="random", compress_share=share)
    for key in map(str, range(20)):
        masks = random_masks(num_tiles, key, config)
        assert masks.shape == (24, num_tiles)
        assert set(masks.sum(0).tolist()) == {round(share * 24)}
        assert num_tiles == 40 or np.ptp(masks.sum(1)) > 0  # else the mean effect would not show
        if num_tiles <= 12:  # twice as many masks as tiles: every effect shows
            assert np.linalg.matrix_rank(masks - masks.mean(0)) == num_tiles


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_refused_with_its_sample(value):
    check_finite("k", np.array([0.0, 1e30]), "losses", "float32", "ratio.dtype")
    with pytest.raises(UserError, match=r"sample a-1: 1 of its 2 losses are not finite; set ratio.dtype"):
        check_finite("a-1", np.array([0.1, value]), "losses", "bfloat16", "ratio.dtype")
    with pytest.raises(UserError, match="not finite; check the policy"):
        check_finite("a-1", np.array([0.1, value]), "losses", "float32", "ratio.dtype")


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


def write_shard_index(folder, shard, split, num_tiles, **more):
    """Write an index of rows with an answer; columns that are not given are empty."""
    values = {
        "shard": shard,
        "split": split,
        "num_tiles": num_tiles,
        "answer_tokens": np.ones(len(shard), int),
        **more,
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


def write_named_shards(folder) -> None:
    sample = np.arange(40)
    write_shard_index(
        folder,
        sample // 10,
        np.where(sample % 2 == 0, "train", "calib"),
        np.ones(40, int),
        source=np.where(sample < 20, "web", "scans"),
        kind=np.where(sample % 4 < 2, "ocr", "chart"),
    )


def test_sources_and_kinds_choose_train_samples(tmp_path):
    write_named_shards(tmp_path)
    notes: list[str] = []

    def rows(**changed: object) -> list[int]:
        config = RatioConfig(splits=("train", "calib"), seed=1, **changed)
        return [row for shard in shards_of(config, tmp_path, notes.append) for row in shard.rows]

    calib = list(range(1, 40, 2))
    assert rows(kinds=("ocr",)) == sorted(calib + list(range(0, 40, 4)))
    assert rows(kinds=("ocr",), sources=("scans",)) == sorted(calib + list(range(20, 40, 4)))
    assert rows(kinds=("ocr", "chart")) == rows() == list(range(40))
    assert notes == []
    some = rows(kinds=("ocr",), max_samples=3)
    assert notes == [
        "takes 3 of 10 train samples (max_samples=3; 0 takes all)",
        "takes 3 of 20 calib samples (max_samples=3; 0 takes all)",
    ]
    assert len(some) == 6 and all(row % 4 == 0 for row in some if row % 2 == 0)


def test_test_samples_have_a_budget_of_their_own(tmp_path):
    sample = np.arange(60)
    split = np.array(["train", "calib", "test"])[sample % 3]
    write_shard_index(tmp_path, sample // 10, split, np.ones(60, int))
    notes: list[str] = []

    def rows(split: int, **changed: int) -> list[int]:
        shards = shards_of(RatioConfig(seed=1, **changed), tmp_path, notes.append)
        return [row for shard in shards for row in shard.rows if row % 3 == split]

    few = rows(2, max_test_samples=4)
    assert notes == ["takes 4 of 20 test samples (max_test_samples=4; 0 takes all)"]
    assert len(few) == 4 and set(few) < set(rows(2, max_samples=9))  # part of a larger choice
    assert [len(rows(split, max_samples=9, max_test_samples=0)) for split in range(3)] == [9, 9, 20]
    with pytest.raises(
        ValueError, match="max_test_samples=4 has no effect with splits=train,calib; set it to null"
    ):
        RatioConfig(seed=1, splits=("train", "calib"), max_test_samples=4)


def test_an_unknown_source_or_kind_is_refused_with_those_that_exist(tmp_path):
    write_named_shards(tmp_path)
    for changed, message in (
        ({"kinds": ("orc",)}, r"ratio\.kinds names orc, .*name some of: chart, ocr"),
        ({"sources": ("we",)}, r"ratio\.sources names we, .*name some of: scans, web"),
    ):
        with pytest.raises(UserError, match=message):
            shards_of(RatioConfig(seed=1, **changed), tmp_path)


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
        (RatioConfig, {"masks": 30}, "masks=30 has no effect with isolation=tile"),
        (RatioConfig, {"isolation": "image", "ridge": 2.0}, "ridge=2.0 has no effect"),
        (RatioConfig, {"isolation": "random", "compress_share": 0.95}, "set at least 40 masks"),
        (RatioConfig, {"isolation": "random", "compress_share": 1.0}, "less than 1"),
        (EvaluateConfig, {"shares": (0.5, 1.0)}, "between 0 and 1"),
        (EvaluateConfig, {"controls": ("rendom",)}, "random"),
    ],
)
def test_configs_refuse_values_that_make_no_sense(config, values, message):
    with pytest.raises(ValidationError, match=message):
        config(seed=0, **values)
