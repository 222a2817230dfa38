"""The label stage on a table of losses."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.label.config import LabelConfig
from stages.label.stage import label_metrics, label_table, run
from stages.losses_policy import check_policy, with_policy
from stages.outputs import FIGURES_FOLDER, LABELS_FILE, METRICS_FILE, RATIOS_FILE
from tests.growth import cpu_growth
from tests.stage_context import stage_context
from vico.errors import UserError

NUM_TILES = 600


def losses(num_tiles: int = NUM_TILES, splits=("train", "train", "train", "calib", "test")) -> pa.Table:
    """Return the losses of invented tiles, a third of them plain with small losses."""
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
    """Return a function that runs the stage on a table: it returns labels, metrics and context."""

    def of(table: pa.Table, **config):
        (tmp_path / "ratio").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "ratio" / RATIOS_FILE)
        context = stage_context("label", tmp_path, {"ratio": tmp_path / "ratio"})
        run(LabelConfig(**{"seed": 3, **config}), context)
        labels = pq.read_table(context.parts.output / LABELS_FILE)
        columns = {name: np.asarray(labels[name].to_pylist()) for name in labels.column_names}
        return columns, json.loads((context.parts.output / METRICS_FILE).read_text()), context

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
    # calib and test are compared with the last tau of train and do not change it
    assert len(np.unique(columns["tau"][~train])) == 1
    assert columns["tau"][~train][0] == metrics["last_tau"]
    assert metrics["share_compressed"] == pytest.approx((columns["label"] == 0).mean())
    plain = table["kind"].to_numpy() == "plain"
    assert metrics["share_compressed_by_kind"]["plain"] == (columns["label"][plain] == 0).mean()
    assert metrics["share_compressed_by_kind"]["plain"] > metrics["share_compressed_by_kind"]["prose"]
    assert set(metrics["share_compressed_by_split"]) == {"train", "calib", "test"}
    assert context.metrics["share_near_tau"] == metrics["share_near_tau"]
    with Image.open(context.parts.output / FIGURES_FOLDER / "losses_by_kind.png") as figure:
        assert figure.width > 600


def test_the_order_of_labelling_is_drawn_by_seed_alone(labelled):
    first, _, _ = labelled(losses(), window_tiles=20)
    same, _, _ = labelled(losses(), window_tiles=20)
    other, _, _ = labelled(losses(), window_tiles=20, seed=4)
    assert (first["tau"] == same["tau"]).all()
    train = first["split"] == "train"
    assert (first["tau"][train] != other["tau"][train]).mean() > 0.9


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


def with_kinds(num_tiles: int) -> pa.Table:
    """Return the losses of tiles whose kinds occur twice each."""
    names = pa.array([f"{n % (num_tiles // 2):05d}" for n in range(num_tiles)])
    return losses(num_tiles).drop_columns("kind").append_column("kind", names)


def test_shares_by_kind_are_those_of_each_kind():
    config, table = LabelConfig(seed=3), with_kinds(1000)
    labels, _ = label_table(table, config, config.floor, "x")
    shares = label_metrics(table, labels, config, "x")["share_compressed_by_kind"]
    compressed = labels["label"].to_numpy() == 0
    assert list(shares) == [f"{n:05d}" for n in range(500)]
    assert shares["00007"] == compressed[[7, 507]].mean()


def test_shares_by_kind_need_one_pass_for_any_number_of_kinds():
    """Users name the kinds, so there may be many; one pass per kind would be quadratic."""
    config = LabelConfig(seed=3)
    tables = {size: with_kinds(size) for size in (4_000, 32_000)}
    labels = {size: label_table(table, config, config.floor, "x")[0] for size, table in tables.items()}
    growth = cpu_growth(lambda size: label_metrics(tables[size], labels[size], config, "x"), 4_000)
    assert growth < 24


def test_losses_that_cannot_be_labelled_are_refused(labelled):
    with pytest.raises(UserError, match="no tiles of the split train"):
        labelled(losses(splits=("calib", "test")))
    table = losses(10)
    zero = table.set_column(table.column_names.index("loss_full"), "loss_full", pa.array(np.zeros(10)))
    with pytest.raises(UserError, match=r"tile 0 of demo-0000 .* label\.floor=0\.0"):
        labelled(zero, floor=0.0)


def test_one_label_for_all_train_tiles_is_refused(labelled):
    table = losses(40)
    same = table.set_column(4, "loss_full", pa.array(np.full(40, 0.1)))
    same = same.set_column(5, "loss_compressed", pa.array(np.full(40, 0.2)))
    with pytest.raises(UserError, match=r"all 24 train tiles get the label compress.*1.90909 to 1.90909"):
        labelled(same)


def test_labels_carry_the_policy_of_their_losses(labelled, tmp_path):
    policies = [tmp_path / name for name in ("policy", "other")]
    for number, policy in enumerate(policies):
        policy.mkdir()
        (policy / "model.safetensors").write_bytes(bytes([number]))
    _, _, context = labelled(with_policy(losses(), policies[0]))
    path = context.parts.output / LABELS_FILE
    check_policy(path, policies[0], "label")
    with pytest.raises(UserError, match=r"of another policy than .*leave out inputs.adopt.label"):
        check_policy(path, policies[1], "label")
    _, _, context = labelled(losses())  # of an earlier version: nothing to compare
    check_policy(context.parts.output / LABELS_FILE, policies[1], "label")
