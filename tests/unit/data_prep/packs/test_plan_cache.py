"""Plans over column files: the same packs as from memory, opened at any step, told apart by index and
settings.
"""

import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.synthetic_index import write_synthetic_index
from data_prep.packs import plan as packs
from data_prep.packs.column_files import column_files
from data_prep.packs.plan_cache import cached_plan
from data_prep.shards.names import INDEX_FILE
from vico.errors import UserError

SETTINGS = {
    "reference_tokens": 4096,
    "tiles": 13,
    "packs_per_step": 4,
    "seed": 0,
    "epoch": 0,
    "tokens_full": 256,
    "window_samples": 500,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of 1,000 samples in row groups that do not end where shards do, with repeats."""
    root = tmp_path_factory.mktemp("synthetic")
    write_synthetic_index(root, 12_000)
    table = pq.read_table(root / INDEX_FILE)
    repeat = np.random.default_rng(1).choice([0, 0.25, 1, 2.5], len(table)).astype(np.float32)
    place = table.schema.get_field_index("repeat")
    table = table.set_column(place, table.schema.field("repeat"), pa.array(repeat))
    pq.write_table(table, root / INDEX_FILE, row_group_size=7001)
    return root


def steps_of(plan, chosen):
    return [
        [
            (
                pack.number,
                pack.rows.tolist(),
                pack.copies.tolist(),
                [rates.tolist() for rates in pack.compressed],
            )
            for pack in plan.step(n)
        ]
        for n in chosen
    ]


def columns_in_memory(folder):
    """As ShardIndex.columns("train"), for an index with the planning columns alone."""
    from data_prep.shards.index import IndexColumns

    table = pq.read_table(folder / INDEX_FILE).to_pydict()
    chosen = [n for n, split in enumerate(table["split"]) if split == "train"]
    tiles = [table["tiles"][n] for n in chosen]
    return IndexColumns(
        rows=np.array(chosen),
        image_starts=np.cumsum([0, *map(len, tiles)]),
        image_tiles=np.array([tile for one in tiles for tile in one], np.int16),
        **{name: np.array(table[name])[chosen] for name in ("shard", "text_tokens", "num_tiles", "repeat")},
    )


def test_columns_from_files_are_those_of_the_index(folder, tmp_path):
    files, memory = column_files(folder / INDEX_FILE, "train", tmp_path), columns_in_memory(folder)
    assert len(files) == len(memory) > 10_000
    for name in ("rows", "shard", "text_tokens", "num_tiles", "repeat", "image_starts", "image_tiles"):
        assert np.array_equal(getattr(files, name), getattr(memory, name)), name
    for found, wanted in zip(files.shard_runs(), memory.shard_runs(), strict=True):
        assert found.tolist() == wanted.tolist()
    chosen = np.array([9_000, 0, 17, 17])
    assert files.at(chosen).image_tiles.tolist() == memory.at(chosen).image_tiles.tolist()


def test_a_cached_plan_is_the_plan_and_opens_without_a_pass(folder, tmp_path, monkeypatch):
    whole = packs.PackPlan(columns_in_memory(folder), **SETTINGS)
    chosen = [0, 1, whole.num_steps // 2, whole.num_steps - 1]
    built = cached_plan(folder, "train", tmp_path, **SETTINGS)
    assert (built.num_steps, built.num_entries) == (whole.num_steps, whole.num_entries)
    assert steps_of(built, chosen) == steps_of(whole, chosen)
    planned = []
    original = packs.PackPlan._packed
    monkeypatch.setattr(packs.PackPlan, "_packed", lambda self, w: planned.append(w) or original(self, w))
    opened = cached_plan(folder, "train", tmp_path, **SETTINGS)
    assert planned == []
    assert steps_of(opened, chosen[2:3]) == steps_of(whole, chosen[2:3])
    assert 1 <= len(planned) <= 2


def test_other_settings_epochs_and_indexes_have_their_own_summary(folder, tmp_path):
    cached_plan(folder, "train", tmp_path, **SETTINGS)
    for changed in ({"epoch": 1}, {"tiles": 20}, {"window_samples": 900}):
        settings = {**SETTINGS, **changed}
        found = cached_plan(folder, "train", tmp_path, **settings)
        wanted = packs.PackPlan(columns_in_memory(folder), **settings)
        assert steps_of(found, [3]) == steps_of(wanted, [3])
    other = tmp_path / "other"
    write_synthetic_index(other, 3000, seed=5)
    assert cached_plan(other, "train", tmp_path, **SETTINGS).num_entries < 3000
    assert cached_plan(other, "calib", tmp_path, **SETTINGS).num_entries < 200
    os.utime(other / INDEX_FILE, (1, 1))
    before = len(list(tmp_path.glob("columns-*")))
    cached_plan(other, "train", tmp_path, **SETTINGS)
    assert len(list(tmp_path.glob("columns-*"))) == before + 1


def num_steps(folder, cache):
    return cached_plan(folder, "train", cache, **SETTINGS).num_steps


def test_processes_that_build_at_once_find_the_same_and_leave_nothing_partial(folder, tmp_path):
    with ProcessPoolExecutor(3) as processes:
        tasks = [processes.submit(num_steps, folder, tmp_path) for _ in range(3)]
        assert len({task.result() for task in tasks}) == 1
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_sample_over_the_budget_and_an_empty_split_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"tiles_per_pack=2 is too small a pack for row \d+"):
        cached_plan(folder, "train", tmp_path, **{**SETTINGS, "tiles": 2})
    with pytest.raises(UserError, match="no samples"):
        cached_plan(folder, "absent", tmp_path, **SETTINGS)
    assert list(tmp_path.glob("summary-*")) == []
