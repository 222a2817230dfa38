"""Plans over column files: the same packs as from memory, cached per index and settings."""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.synthetic_index import write_synthetic_index
from data_prep.packs.column_files import column_files
from data_prep.packs.pack import PackBudget
from data_prep.packs.plan import PackPlan, PlanSettings
from data_prep.packs.plan_cache import cached_plan
from data_prep.shards.index import IndexColumns
from data_prep.shards.names import INDEX_FILE
from tests.unit.data_prep.packs.test_plan import as_values
from vico.errors import UserError

BUDGET = PackBudget(reference_tokens=4096, tiles=13, tokens_full=256)
SETTINGS = PlanSettings(BUDGET, packs_per_step=4, seed=0, epoch=0, window_samples=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with shards of 1,000 samples, with repeats, in row groups that do not end where shards do."""
    root = tmp_path_factory.mktemp("synthetic")
    write_synthetic_index(root, 12_000)
    table = pq.read_table(root / INDEX_FILE)
    repeat = np.random.default_rng(1).choice([0, 0.25, 1, 2.5], len(table)).astype(np.float32)
    position = table.schema.get_field_index("repeat")
    table = table.set_column(position, table.schema.field("repeat"), pa.array(repeat))
    pq.write_table(table, root / INDEX_FILE, row_group_size=7001)
    return root


def steps_of(plan: PackPlan, steps: Iterable[int]) -> list[list[tuple]]:
    return [[as_values(pack) for pack in plan.step(n)] for n in steps]


def columns_in_memory(folder: Path) -> IndexColumns:
    """Return what ShardIndex.columns("train") returns, for an index with only the planning columns."""
    table = pq.read_table(folder / INDEX_FILE).to_pydict()
    chosen = [n for n, split in enumerate(table["split"]) if split == "train"]
    tiles = [table["tiles"][n] for n in chosen]
    return IndexColumns(
        rows=np.array(chosen),
        image_starts=np.cumsum([0, *map(len, tiles)]),
        image_tiles=np.array([tile for image_tiles in tiles for tile in image_tiles], np.int16),
        **{name: np.array(table[name])[chosen] for name in ("shard", "text_tokens", "num_tiles", "repeat")},
    )


def test_columns_from_files_equal_those_of_the_index(folder, tmp_path):
    files, memory = column_files(folder / INDEX_FILE, "train", tmp_path), columns_in_memory(folder)
    assert len(files) == len(memory) > 10_000
    for name in ("rows", "shard", "text_tokens", "num_tiles", "repeat", "image_starts", "image_tiles"):
        assert np.array_equal(getattr(files, name), getattr(memory, name)), name
    for from_files, from_memory in zip(files.shard_runs(), memory.shard_runs(), strict=True):
        assert from_files.tolist() == from_memory.tolist()
    chosen = np.array([9_000, 0, 17, 17])
    assert files.at(chosen).image_tiles.tolist() == memory.at(chosen).image_tiles.tolist()


def test_a_cached_plan_equals_the_plan_and_opens_without_a_pass(folder, tmp_path, monkeypatch):
    whole = PackPlan(columns_in_memory(folder), SETTINGS)
    chosen = [0, 1, whole.num_steps // 2, whole.num_steps - 1]
    built = cached_plan(folder, "train", tmp_path, SETTINGS)
    assert (built.num_steps, built.num_entries) == (whole.num_steps, whole.num_entries)
    assert steps_of(built, chosen) == steps_of(whole, chosen)
    planned = []
    original = PackPlan._packed
    monkeypatch.setattr(PackPlan, "_packed", lambda self, w: planned.append(w) or original(self, w))
    opened = cached_plan(folder, "train", tmp_path, SETTINGS)
    assert planned == []
    assert steps_of(opened, chosen[2:3]) == steps_of(whole, chosen[2:3])
    assert 1 <= len(planned) <= 2


def test_other_settings_epochs_and_indexes_have_their_own_summary(folder, tmp_path):
    cached_plan(folder, "train", tmp_path, SETTINGS)
    for changed in ({"epoch": 1}, {"budget": replace(BUDGET, tiles=20)}, {"window_samples": 900}):
        settings = replace(SETTINGS, **changed)
        cached = cached_plan(folder, "train", tmp_path, settings)
        assert steps_of(cached, [3]) == steps_of(PackPlan(columns_in_memory(folder), settings), [3])
    other = tmp_path / "other"
    write_synthetic_index(other, 3000, seed=5)
    assert cached_plan(other, "train", tmp_path, SETTINGS).num_entries < 3000
    assert cached_plan(other, "calib", tmp_path, SETTINGS).num_entries < 200
    os.utime(other / INDEX_FILE, (1, 1))
    before = len(list(tmp_path.glob("columns-*")))
    cached_plan(other, "train", tmp_path, SETTINGS)
    assert len(list(tmp_path.glob("columns-*"))) == before + 1


def num_steps(folder, cache):
    return cached_plan(folder, "train", cache, SETTINGS).num_steps


def test_processes_that_build_concurrently_agree_and_leave_nothing_partial(folder, tmp_path):
    with ProcessPoolExecutor(3) as processes:
        tasks = [processes.submit(num_steps, folder, tmp_path) for _ in range(3)]
        assert len({task.result() for task in tasks}) == 1
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_sample_over_the_budget_and_an_empty_split_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"tiles_per_pack=2 is too small a pack for row \d+"):
        cached_plan(folder, "train", tmp_path, replace(SETTINGS, budget=replace(BUDGET, tiles=2)))
    with pytest.raises(UserError, match="no samples"):
        cached_plan(folder, "absent", tmp_path, SETTINGS)
    assert list(tmp_path.glob("summary-*")) == []
