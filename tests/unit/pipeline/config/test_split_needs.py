"""Empty splits that the config alone shows are refused before anything starts."""

from pathlib import Path

import pytest

from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import PipelineConfig, load_config
from pipeline.config.split_needs import check_split_needs
from vico.errors import UserError

STAGES = pipeline_graph().names
HEAD = "inputs: {records: {format: demo, num_samples: 4}, model: m}\n"


@pytest.fixture
def config(tmp_path):
    """Return a function: overrides -> config."""
    path: Path = tmp_path / "pipeline.yaml"
    path.write_text(HEAD)

    def with_overrides(*overrides: str) -> PipelineConfig:
        return load_config(path, pipeline_graph(), overrides)

    return with_overrides


@pytest.mark.parametrize(
    "overrides, until, message",
    [
        (
            ("shard.calib_share=0",),
            "router",
            r"shard\.calib_share=0 leaves no calib samples, and router .*set",
        ),
        (("shard.calib_share=0",), "export", r"shard\.calib_share=0 leaves no calib samples"),
        (
            ("shard.calib_share=0", "consistency.select=best"),
            "consistency",
            r"calib_share=0 leaves no calib samples, and consistency needs some to choose",
        ),
        (
            ("shard.test_share=0",),
            "evaluate",
            r"shard\.test_share=0 without inputs\.heldout leaves no test samples, and evaluate .*set",
        ),
        (("ratio.splits=[train,test]",), "router", r"ratio\.splits=train,test gives .*add calib to ratio"),
    ],
)
def test_a_split_that_the_config_leaves_empty_is_refused(config, overrides, until, message):
    until_stage = STAGES[: STAGES.index(until) + 1]
    check_split_needs(config(), until_stage)
    with pytest.raises(UserError, match=message):
        check_split_needs(config(*overrides), until_stage)
    check_split_needs(config(*overrides), STAGES[: STAGES.index(until)] if until != "export" else ["shard"])


def test_what_the_config_does_not_decide_is_let_through(config):
    check_split_needs(config("shard.test_share=0", "inputs.heldout={format: demo, num_samples: 3}"), STAGES)
    check_split_needs(config("shard.calib_share=0", "inputs.adopt={router: r}"), STAGES)
    check_split_needs(config("shard.calib_share=0", "shard.test_share=0", "inputs.adopt={shard: s}"), STAGES)
    check_split_needs(config("ratio.splits=[train]", "inputs.adopt={label: l}"), STAGES)
