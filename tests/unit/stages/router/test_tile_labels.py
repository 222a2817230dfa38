"""Labels and targets of a sample's tiles as the router stage looks them up."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.outputs import LABELS_FILE
from stages.router.tile_labels import TileLabels
from vico.errors import UserError
from vico.objectives.router import IGNORED, class_weights


def test_labels_are_in_prompt_order_for_any_order_of_the_file(tmp_path):
    rows = [
        {"key": "b", "split": "train", "image": 1, "tile": 1, "label": 1},
        {"key": "a", "split": "train", "image": 0, "tile": 0, "label": 0},
        {"key": "b", "split": "train", "image": 0, "tile": 0, "label": 1},
        {"key": "b", "split": "train", "image": 1, "tile": 0, "label": 0},
        {"key": "a", "split": "train", "image": 0, "tile": 2, "label": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / LABELS_FILE)
    labels = TileLabels(tmp_path)
    assert labels.keys.to_pylist() == ["a", "b"]
    assert labels.of("a", (3,))[0].tolist() == [0, IGNORED, 1]
    assert labels.of("b", (1, 2))[0].tolist() == [1, 0, 1]
    assert labels.of("c", (2, 1))[0].tolist() == [IGNORED] * 3
    assert labels.of("c", ())[0].tolist() == []


def written(folder, ratios, split="train"):
    rows = [
        {"key": f"k{n}", "split": split, "image": 0, "tile": 0, "ratio": r, "tau": 2.0, "label": int(r > 2)}
        for n, r in enumerate(ratios)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / LABELS_FILE)
    return folder


def test_soft_targets_rise_with_the_ratio_and_are_a_half_at_tau(tmp_path):
    labels = TileLabels(written(tmp_path, [0.5, 1.9, 2.0, 2.1, 40.0]), soft_spread=0.5)
    targets = [float(labels.of(f"k{n}", (1,))[1][0]) for n in range(5)]
    assert targets == sorted(targets)
    assert targets[2] == pytest.approx(0.5)
    assert targets[0] == pytest.approx(1 / (1 + np.exp(np.log(4) / 0.5)))
    hard = TileLabels(tmp_path)
    assert [float(hard.of(f"k{n}", (1,))[1][0]) for n in range(5)] == [0, 0, 0, 1, 1]


def test_balanced_weights_give_both_labels_the_same_total():
    of_compress, of_keep = class_weights(3, 1)
    assert 3 * of_compress == pytest.approx(of_keep) == pytest.approx(2)


def test_totals_count_a_sample_as_often_as_it_is_repeated(tmp_path):
    labels = TileLabels(written(tmp_path, [1.0, 1.0, 1.0, 5.0, 5.0]))
    assert labels.totals(["k0", "none", "k3"], np.array([1.0, 7.0, 4.0])) == (1, 4)
    assert labels.totals(["k4", "k1", "k2"], np.array([0.5, 1.0, 1.0])) == (2, 0.5)
    soft = TileLabels(written(tmp_path, [2.0, 5.0]), soft_spread=0.5)
    assert soft.totals(["k0"], np.array([3.0])) == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize(("ratio", "label"), [(1.0, "compress"), (3.0, "keep")])
def test_labels_of_one_class_are_refused(tmp_path, ratio, label):
    labels = TileLabels(written(tmp_path, [ratio] * 3))
    with pytest.raises(UserError, match=f"all 3 labels of train tiles are {label}; a router needs both"):
        labels.check_both_labels()


def test_ratios_that_are_not_finite_are_refused_as_soft_targets(tmp_path):
    with pytest.raises(UserError, match="ratios and taus above 0"):
        TileLabels(written(tmp_path, [1.0, float("inf")]), soft_spread=0.5)
