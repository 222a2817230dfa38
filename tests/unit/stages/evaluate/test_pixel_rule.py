"""Pixel measures of real pictures, and the choice of one measure on calib."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.demo.records import drawn_record
from data_prep.records.config import RecordsConfig
from stages.evaluate.tile_measures.pixel_features import FEATURES, SCHEMA, pixel_features
from stages.evaluate.tile_measures.pixel_rule import demo_sources, feature_aucs, pixel_rule_choice
from vico.tiling import Tiling, tile_pixels


def first_of_kind(kind: str) -> Image.Image:
    for line in range(200):
        drawn = drawn_record(0, line)
        if drawn.kind == kind:
            return drawn.content.canvas.image
    raise AssertionError(kind)


def test_a_plain_tile_has_less_detail_than_a_page_or_a_photograph():
    tiling = Tiling(112, 1)
    plain, prose, photo = (
        pixel_features(tile_pixels(first_of_kind(kind), tiling)) for kind in ("plain", "prose", "photograph")
    )
    for name in FEATURES:
        assert plain[name][0] < prose[name][0] and plain[name][0] < photo[name][0], name


def test_measures_are_taken_from_the_pixels_the_model_sees():
    levels = np.zeros((8, 8, 3), np.uint8)
    levels[:, 4:] = 100  # one step of 100 gray levels in each of 8 rows of 7 differences
    features = pixel_features(tile_pixels(Image.fromarray(levels), Tiling(8, 1)))
    assert features["gradient_energy"] == pytest.approx([100**2 / 7])
    assert features["gray_deviation"] == pytest.approx([50.0])
    assert 100 < features["jpeg_bytes_a_pixel"][0] * 64 < 1000


def measured(split_of_tile, **features) -> pa.Table:
    count = len(split_of_tile)
    columns = {"key": [f"k{n}" for n in range(count)], "split": split_of_tile}
    columns |= {"image": [0] * count, "tile": [0] * count, "content": [None] * count}
    return pa.table(columns | dict.fromkeys(FEATURES, [0.0] * count) | features, SCHEMA)


def test_the_measure_that_ranks_calib_best_is_chosen_regardless_of_test():
    splits = ["calib"] * 4 + ["test"] * 4
    labels = {(f"k{n}", 0, 0): n % 2 for n in range(8)}
    table = measured(
        splits,
        gradient_energy=[0, 1, 0, 1, 1, 0, 1, 0],  # right on calib, wrong on test
        gray_deviation=[1, 0, 0, 1, 0, 1, 0, 1],
    )
    choice = pixel_rule_choice(table, labels)
    assert choice["feature"] == "gradient_energy"
    assert choice["auc_calib"] == {
        "jpeg_bytes_a_pixel": 0.5,
        "gradient_energy": 1.0,
        "gray_deviation": 0.5,
    }
    assert choice["auc_test"]["gradient_energy"] == 0.0 and choice["auc_test"]["gray_deviation"] == 1.0


def test_tiles_without_a_label_do_not_count_and_a_single_label_gives_no_rule():
    table = measured(["calib"] * 3, gray_deviation=[0, 1, 5])
    assert feature_aucs(table, {("k0", 0, 0): 0, ("k1", 0, 0): 1}, "calib")["gray_deviation"] == 1.0
    assert pixel_rule_choice(table, {("k0", 0, 0): 1})["feature"] is None


def test_only_the_demo_is_drawn_again():
    demo = RecordsConfig(format="demo", num_samples=5, seed=9)
    assert demo_sources(demo, None) == {"demo": demo}
    assert demo_sources(None, demo) == {"heldout-demo": demo}
