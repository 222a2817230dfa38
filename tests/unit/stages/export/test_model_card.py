"""What the model card says about the data."""

from stages.export.model_card import CardSources, model_card
from stages.export.start_model import StartModel

POINT = {
    "threshold": 0.5,
    "quality_kept": 1.0,
    "share_compressed": 0.5,
    "tokens_saved": 0.3,
    "similarity": 0.8,
    "exact_match": 0.5,
}
METRICS = {
    "tokens_a_tile": {"full": 256, "compressed": 64},
    "num_samples": 10,
    "reference": POINT,
    "full": POINT,
    "compressed": POINT,
    "routed": [POINT],
    "served": [POINT],
    "random": [POINT],
    "shuffled": [],
    "pixel_rule": [],
    "oracle": [],
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
