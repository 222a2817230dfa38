"""Pixel measures of real pictures, and the rule that is fitted to them on calib."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from data_prep.demo.records import drawn_record
from data_prep.records.config import RecordsConfig
from stages.evaluate.tile_measures.pixel_features import FEATURES, SCHEMA, pixel_features
from stages.evaluate.tile_measures.pixel_rule import demo_sources, fitted_pixel_rule
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


def tiles_of_two_measures() -> tuple[pa.Table, dict[tuple[str, int, int], int]]:
    """400 calib and 400 test tiles that need the full rate if their gradients are strong for their bytes."""
    rng = np.random.default_rng(3)
    log_bytes, log_gradient = rng.normal(0, 2, (2, 800))
    keep = log_gradient - log_bytes > 0.5
    table = measured(
        ["calib"] * 400 + ["test"] * 400,
        jpeg_bytes_a_pixel=0.1 * np.exp(log_bytes),
        gradient_energy=100 * np.exp(log_gradient),
        gray_deviation=rng.uniform(0, 90, 800),
    )
    return table, {(f"k{n}", 0, 0): int(keep[n]) for n in range(800)}


def test_the_rule_weighs_the_measures_and_ranks_better_than_any_one_of_them():
    table, labels = tiles_of_two_measures()
    fit, score_N = fitted_pixel_rule(table, labels)
    assert fit["weights"]["jpeg_bytes_a_pixel"] < -1 and fit["weights"]["gradient_energy"] > 1
    assert abs(fit["weights"]["gray_deviation"]) < 0.5
    for aucs in (fit["auc_calib"], fit["auc_test"]):
        assert aucs["pixel_rule"] > 0.97 and max(aucs[name] for name in FEATURES) < 0.85
    keep_N = np.array([labels[f"k{n}", 0, 0] for n in range(800)])
    assert roc_auc_score(keep_N[400:], score_N[400:]) == pytest.approx(fit["auc_test"]["pixel_rule"])


def test_test_tiles_have_no_influence_on_the_rule():
    table, labels = tiles_of_two_measures()
    fit, score_N = fitted_pixel_rule(table, labels)
    turned = {key: 1 - label if int(key[0][1:]) >= 400 else label for key, label in labels.items()}
    other, other_N = fitted_pixel_rule(table, turned)
    assert other["weights"] == fit["weights"] and other["auc_calib"] == fit["auc_calib"]
    assert other["auc_test"]["pixel_rule"] == pytest.approx(1 - fit["auc_test"]["pixel_rule"])
    np.testing.assert_array_equal(other_N, score_N)
    for number, name in enumerate(table.column_names):
        if name in FEATURES:
            values = table[name].to_numpy() * np.repeat([1.0, 50.0], 400)
            table = table.set_column(number, name, pa.array(values))
    other, other_N = fitted_pixel_rule(table, labels)
    assert other["weights"] == pytest.approx(fit["weights"], rel=1e-9)
    np.testing.assert_allclose(other_N[:400], score_N[:400], rtol=1e-9)


def test_tiles_without_a_label_do_not_count():
    table, labels = tiles_of_two_measures()
    some = {key: label for key, label in labels.items() if int(key[0][1:]) % 2}
    rows = [row for row in range(800) if row % 2]
    fit, score_N = fitted_pixel_rule(table, some)
    alone, alone_N = fitted_pixel_rule(table.take(rows), some)
    assert alone["weights"] == pytest.approx(fit["weights"], rel=1e-9)
    assert (alone["auc_calib"], alone["auc_test"]) == (fit["auc_calib"], fit["auc_test"])
    np.testing.assert_allclose(alone_N, score_N[rows], rtol=1e-9)


def test_blank_tiles_have_finite_scores_and_a_single_label_gives_no_rule():
    table = measured(["calib"] * 3, gray_deviation=[0, 1, 5])
    fit, score_N = fitted_pixel_rule(table, {("k0", 0, 0): 0, ("k1", 0, 0): 1})
    assert np.isfinite(score_N).all() and fit["auc_calib"]["gray_deviation"] == 1.0
    fit, score_N = fitted_pixel_rule(table, {("k0", 0, 0): 1})
    assert score_N is None and fit["weights"] is None
    assert fit["auc_calib"] == fit["auc_test"] == dict.fromkeys(FEATURES)


def test_only_the_demo_is_drawn_again():
    demo = RecordsConfig(format="demo", num_samples=5, seed=9)
    assert demo_sources(demo, None) == {"demo": demo}
    assert demo_sources(None, demo) == {"heldout-demo": demo}
