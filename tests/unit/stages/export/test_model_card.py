"""What the model card says of the data."""

from stages.export.model_card import model_card

ENTRY = {
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
    "reference": ENTRY,
    "full": ENTRY,
    "compressed": ENTRY,
    "routed": [ENTRY],
    "served": [ENTRY],
}
ROUTER = {"absolute_threshold": 0.5, "auc": 0.9, "num_test": 20}


def card(**data):
    manifest = {"written": 1300, "shards": [{"sha256": "ab"}], **data}
    return model_card(("base", "cd"), "apache-2.0", manifest, METRICS, ROUTER)


def test_licences_and_origins_of_the_data_are_named_with_their_samples():
    text = card(licenses={"CC0": 1200, "": 60, "a|b\nc": 40}, origins={"": 1300})
    assert (
        "| licences of the data | as stated by each record: CC0 (1,200), a/b c (40); 60 not stated |" in text
    )
    assert "| origins of the data | not stated by records or sets |" in text
