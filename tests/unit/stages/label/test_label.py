"""The label stage on a table of losses."""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.label.stage import LabelConfig, label_metrics, run
from stages.label.stage import labelled as labelled_table
from tests.stage_context import stage_context
from vico.errors import UserError

NUM_TILES = 600


def losses(num_tiles: int = NUM_TILES, splits=("train", "train", "train", "calib", "test")) -> pa.Table:
    """Tiles of made-up samples, a third of them plain with small losses."""
    random = np.random.default_rng(5)
    plain = np.arange(num_tiles) % 3 == 0
    return pa.table(
        {
            "key": [f"demo-{n:04d}" for n in range(num_tiles)],
            "split": [splits[n % len(splits)] for n in range(num_tiles)],
            "image": np.zeros(num_tiles, np.int32),
            "tile": np.zeros(num_tiles, np.int32),
            "loss_full": random.exponential(0.005, num_tiles),
            "loss_compressed": random.exponential(np.where(plain, 0.01, 0.3)),
            "kind": np.where(plain, "plain", "prose"),
        }
    )


@pytest.fixture
def labelled(tmp_path):
    """Runs the stage over a table; (labels as columns, metrics, context)."""

    def of(table: pa.Table, **config):
        (tmp_path / "ratio").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "ratio" / "ratios.parquet")
        context = stage_context("label", tmp_path, {"ratio": tmp_path / "ratio"})
        run(LabelConfig(**{"seed": 3, **config}), context)
        labels = pq.read_table(context.parts.output / "labels.parquet")
        columns = {name: np.asarray(labels[name].to_pylist()) for name in labels.column_names}
        return columns, json.loads((context.parts.output / "metrics.json").read_text()), context

    return of


def test_labels_follow_from_the_losses(labelled):
    table = losses()
    columns, metrics, context = labelled(table, floor=0.01, percentile=40.0, window_tiles=50)
    assert list(columns) == ["key", "split", "image", "tile", "ratio", "tau", "label"]
    expected = (table["loss_compressed"].to_numpy() + 0.01) / (table["loss_full"].to_numpy() + 0.01)
    np.testing.assert_allclose(columns["ratio"], expected, rtol=1e-15)
    assert columns["key"].tolist() == table["key"].to_pylist()
    assert (columns["label"] == (columns["ratio"] > columns["tau"])).all()
    train = columns["split"] == "train"
    assert (
        len(np.unique(columns["tau"][~train])) == 1
    )  # calib and test see the last tau of train, move nothing
    assert columns["tau"][~train][0] == metrics["last_tau"]
    assert metrics["share_compressed"] == pytest.approx((columns["label"] == 0).mean())
    plain = table["kind"].to_numpy() == "plain"
    assert metrics["share_compressed_by_kind"]["plain"] == (columns["label"][plain] == 0).mean()
    assert metrics["share_compressed_by_kind"]["plain"] > metrics["share_compressed_by_kind"]["prose"]
    assert set(metrics["share_compressed_by_split"]) == {"train", "calib", "test"}
    assert context.metrics["share_near_tau"] == metrics["share_near_tau"]
    with Image.open(context.parts.output / "figures" / "losses_by_kind.png") as figure:
        assert figure.width > 600


def test_the_order_of_labelling_is_drawn_by_seed_alone(labelled):
    one, _, _ = labelled(losses(), window_tiles=20)
    same, _, _ = labelled(losses(), window_tiles=20)
    other, _, _ = labelled(losses(), window_tiles=20, seed=4)
    assert (one["tau"] == same["tau"]).all()
    train = one["split"] == "train"
    assert (one["tau"][train] != other["tau"][train]).mean() > 0.9


def test_train_labels_do_not_know_the_other_splits(labelled):
    table = losses()
    train = table.filter(pa.array(np.asarray(table["split"].to_pylist()) == "train"))
    with_others, _, _ = labelled(table)
    alone, _, _ = labelled(train)
    assert (with_others["tau"][with_others["split"] == "train"] == alone["tau"]).all()


def test_changed_labels_at_other_floors_are_counted(labelled):
    table = losses()
    columns, metrics, _ = labelled(table, floor=0.01)
    third, _, _ = labelled(table, floor=0.01 / 3)
    triple, _, _ = labelled(table, floor=0.01 * 3)
    assert metrics["share_changed_at_third_floor"] == (columns["label"] != third["label"]).mean() > 0
    assert metrics["share_changed_at_triple_floor"] == (columns["label"] != triple["label"]).mean() > 0


def test_shares_by_kind_take_one_pass_however_many_kinds_there_are():
    """A kind is whatever a row says; a pass for each would be kinds times tiles."""
    table = losses(100_000).drop_columns("kind")
    table = table.append_column("kind", pa.array([f"{n % 50_000:05d}" for n in range(100_000)]))
    config = LabelConfig(seed=3)
    labels, _ = labelled_table(table, config, config.floor, "x")
    begun = time.process_time()
    found = label_metrics(table, labels, config, "x")["share_compressed_by_kind"]
    assert time.process_time() - begun < 3
    compressed = labels["label"].to_numpy() == 0
    assert list(found) == [f"{n:05d}" for n in range(50_000)]
    assert found["00007"] == compressed[[7, 50_007]].mean()


def test_what_cannot_be_labelled_is_said(labelled):
    with pytest.raises(UserError, match="no tiles of the split train"):
        labelled(losses(splits=("calib", "test")))
    table = losses(10)
    zero = table.set_column(table.column_names.index("loss_full"), "loss_full", pa.array(np.zeros(10)))
    with pytest.raises(UserError, match=r"tile 0 of demo-0000 .* label\.floor=0\.0"):
        labelled(zero, floor=0.0)
