"""Config blocks as one level of dotted keys."""

from pipeline.config.dotted_keys import flattened_text


def test_configs_flatten_to_text():
    config = {"lr": 1e-5, "optimizer": {"betas": [0.9, 0.95], "name": "adamw"}, "max": None, "none": {}}
    assert flattened_text(config) == {
        "lr": "1e-05",
        "optimizer.betas": "[0.9, 0.95]",
        "optimizer.name": "adamw",
        "max": "null",
        "none": "{}",
    }
