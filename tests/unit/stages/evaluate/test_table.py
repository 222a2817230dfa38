"""The evaluation's table: which points it shows, and what it says about groups."""

import pytest

from stages.evaluate.table import distinct_points, findings, shown_points


def metrics_of(shares: list[float], calibrated: int) -> dict:
    routed = [
        {"threshold": 1 - n / 100, "share_compressed": share, "tokens_saved": 0.75 * share}
        for n, share in enumerate(shares)
    ]
    return {"routed": routed, "absolute_threshold": routed[calibrated]["threshold"]}


@pytest.mark.parametrize(
    "shares, calibrated, shown",
    [
        ([0.1, 0.33, 0.5, 0.67, 0.9], 2, [1, 2, 3]),
        ([0.1, 0.373, 0.645, 0.662, 0.9], 2, [1, 2]),  # the calibrated point stands for the one beside it
        ([0.1, 0.34, 0.34, 0.67], 1, [1, 3]),  # two thresholds, the same tiles
        ([0.5, 0.52], 1, [1]),
        ([0.48, 0.51, 0.9], 2, [0, 2]),  # both shown shares have nearly the same nearest point
    ],
)
def test_points_that_are_nearly_the_same_are_shown_once(shares, calibrated, shown):
    assert shown_points(metrics_of(shares, calibrated)) == shown


def test_limits_that_cut_no_picture_differently_are_shown_once():
    saved = {1: 0.6, 2: 0.5, 3: 0.5, 4: 0.0, 6: 0.0}
    points = [{"max_tiles": most, "tokens_saved": share} for most, share in saved.items()]
    assert [point["max_tiles"] for point in distinct_points(points)] == [4, 2, 1]


@pytest.mark.parametrize(
    "unit, num_units, num_groups, expected",
    [
        ("sample", 12, 0, "1,000 resamples of 12 samples"),
        ("sample", 12, 1, "1,000 resamples of 12 samples (the samples come from 1 group)"),
        ("sample", 316, 11, "1,000 resamples of 316 samples (the samples come from 11 groups)"),
        ("picture", 207, 0, "1,000 resamples of 207 pictures"),
        ("picture", 207, 11, "1,000 resamples of 207 pictures (the samples come from 11 groups)"),
        ("group", 30, 30, "1,000 resamples of 30 groups"),
        ("group", 31, 30, "1,000 resamples of 30 groups and 1 picture without a group"),
        ("group", 2000, 30, "1,000 resamples of 30 groups and 1,970 pictures without a group"),
    ],
)
def test_the_basis_of_the_intervals_names_only_groups_that_exist(unit, num_units, num_groups, expected):
    metrics = {
        "num_samples": 12,
        "num_tiles": 30,
        "intervals": {
            "level": 0.95,
            "resamples": 1000,
            "unit": unit,
            "num_units": num_units,
            "num_groups": num_groups,
        },
        "router": {"auc": None, "auc_interval": None, "num_tiles": 0},
        "gap_closed": None,
    }
    assert findings(metrics)[0].endswith(f"intervals over {expected}")


AUCS = {"auc_calib": {"pixel_rule": 0.7521}, "auc_test": {"pixel_rule": 0.7801}}


@pytest.mark.parametrize(
    "fit, line",
    [
        ({}, []),  # of an older evaluate stage
        ({"pixel_rule_fit": {"weights": None}}, []),
        (
            {"pixel_rule_fit": {"weights": {}, **AUCS}},
            ["pixel rule: AUC 0.752 on calib tiles, 0.780 on test tiles"],
        ),
        (
            {"pixel_rule_fit": {"weights": {}, **AUCS, "auc_test": {"pixel_rule": None}}},
            ["pixel rule: AUC 0.752 on calib tiles, - on test tiles"],
        ),
    ],
)
def test_the_pixel_rule_has_a_line_if_there_is_one(fit, line):
    basis = {"level": 0.95, "resamples": 9, "unit": "sample", "num_units": 12, "num_groups": 0}
    metrics = {
        "num_samples": 12,
        "num_tiles": 30,
        "intervals": basis,
        "router": {"auc": None, "auc_interval": None, "num_tiles": 0},
        "gap_closed": None,
    }
    assert findings(metrics | fit)[2:] == line
