"""What the model card says about the data and the thresholds, and the table of thresholds beside it."""

import json

import pytest

from stages.export.model_card import CardSources, model_card
from stages.export.start_model import StartModel
from stages.export.thresholds import THRESHOLDS_FILE, write_thresholds

POINT = {
    "threshold": 0.5,
    "quality_kept": 1.0,
    "share_compressed": 0.5,
    "tokens_saved": 0.3,
    "similarity": 0.8,
    "exact_match": 0.5,
    "quality_kept_interval": [0.97, 1.02],
}
METRICS = {
    "tokens_a_tile": {"full": 256, "compressed": 64},
    "num_samples": 10,
    "absolute_threshold": 0.5,
    "intervals": {"level": 0.95, "resamples": 1000, "unit": "sample", "num_units": 10, "num_groups": 0},
    "reference": POINT,
    "full": POINT,
    "compressed": POINT,
    "routed": [POINT],
    "served": [POINT],
    "random": [POINT],
    "shuffled": [],
    "pixel_rule": [],
    "blind_oracle": [],
    "seeing_oracle": [],
    "oracle": [],
    "fewer_tiles": [],
}
ROUTER = {"absolute_threshold": 0.5, "auc": 0.9, "num_test": 20}


def card(**data) -> str:
    manifest = {"written": 1300, "shards": [{"sha256": "ab"}], **data}
    start = StartModel("base", "cd", "apache-2.0")
    return model_card(CardSources(start, manifest, METRICS, ROUTER))


def test_licences_and_origins_of_the_data_are_named_with_their_samples():
    text = card(licenses={"CC0": 1200, "": 60, "a|b\nc": 40}, origins={"": 1300})
    assert (
        "| licences of the data | as stated by each record: CC0 (1,200), a\\|b c (40); 60 not stated |"
        in text
    )
    assert "| origins of the data | not stated by records or sets |" in text


def test_the_thresholds_of_both_rules_are_listed():
    rows = [line for line in card().splitlines() if line.startswith("| **")]
    assert [row.split(" | ")[0] for row in rows] == ["| **ours**", "| **served**"]


def test_each_threshold_has_the_interval_of_its_quality():
    rows = [line for line in card().splitlines() if line.startswith("| **ours**")]
    assert [row.split(" | ")[5:7] for row in rows] == [["**100.0%**", "**97.0% to 102.0%**"]]


@pytest.mark.parametrize(
    ("unit", "num_units", "num_groups", "expected"),
    [
        ("sample", 10, 0, "over 1,000 resamples of 10 samples."),
        ("sample", 10, 3, "over 1,000 resamples of 10 samples (the samples come from 3 groups)."),
        ("group", 21, 21, "over 1,000 resamples of 21 groups."),
    ],
)
def test_the_card_says_what_its_intervals_resample(unit, num_units, num_groups, expected):
    basis = {**METRICS["intervals"], "unit": unit, "num_units": num_units, "num_groups": num_groups}
    sources = CardSources(
        StartModel("base", "cd", "x"), {"written": 1, "shards": []}, {**METRICS, "intervals": basis}, ROUTER
    )
    assert expected in " ".join(model_card(sources).split())


CHOICE = {"wanted": 0.99, "reached": True, "num_samples": 160, "threshold": 0.5}


@pytest.mark.parametrize(
    ("reached", "ending"), [(True, "0%."), (False, "0%, which no measured threshold reached there.")]
)
def test_a_threshold_for_a_wanted_quality_is_named_as_such(reached, ending):
    metrics = {**METRICS, "wanted_quality": {**CHOICE, "reached": reached}}
    manifest = {"written": 1, "shards": []}
    text = model_card(CardSources(StartModel("base", "cd", "x"), manifest, metrics, ROUTER))
    line = next(line for line in text.splitlines() if "calibration samples" in line)
    assert line.endswith(f"chosen on 160 calibration samples for a kept quality of 99.{ending}")


def test_the_card_says_how_firm_the_threshold_is():
    router = {
        **ROUTER,
        "calibrated_share": 0.66,
        "threshold_margin": 0.021,
        "share_in_margin": 0.004,
        "blank_tiles": 512,
        "blank_compressed": 512,
    }
    manifest = {"written": 1, "shards": []}
    text = model_card(CardSources(StartModel("base", "cd", "x"), manifest, METRICS, router))
    assert "compresses 66.0% of the calibration tiles and 512 of 512 blank ones" in text
    assert "0.021 away in log-odds, 0.4% of the test tiles are nearer" in text


def test_the_table_of_thresholds_has_shares_and_qualities_by_tokens_saved(tmp_path):
    other = {**POINT, "threshold": 0.7, "tokens_saved": 0.1, "quality_kept_interval": None}
    write_thresholds(tmp_path, {**METRICS, "routed": [POINT, other]})
    table = json.loads((tmp_path / THRESHOLDS_FILE).read_text())
    assert table["num_samples"] == 10 and table["interval_level"] == 0.95
    assert [row["threshold"] for row in table["thresholds"]] == [0.7, 0.5]
    assert [row["is_default"] for row in table["thresholds"]] == [False, True]
    assert table["thresholds"][1]["quality_kept_interval"] == [0.97, 1.02]


def test_texts_of_data_and_of_the_start_model_are_shown_as_they_are():
    text = model_card(
        CardSources(
            StartModel("<b>\x1b[2J", "cd", "[free](http://a)"),
            {"written": 1, "shards": [], "licenses": {"<script>\u202e": 1}},
            METRICS,
            ROUTER,
            run="a`b\x1b",
        )
    )
    assert r"| base model | \<b\>\\x1b\[2J, sha256" in text
    assert r"| licence of the base model | \[free\](http://a) |" in text
    assert r"\<script\>\\u202e (1)" in text and r"| run | `a'b\x1b` |" in text
