"""Samples so long that they would change the model's rotary frequencies are refused before any is written."""

import pytest

from stages.shard.config import ShardConfig
from stages.shard.tasks import check_max_tokens
from tests.tiny_model import make_tiny_model
from vico.errors import UserError


@pytest.mark.parametrize(
    "rope, limit",
    [
        (None, None),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, None),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 4096),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_dynamic_scaling_limits_the_tokens_of_a_sample(tmp_path, rope, limit, kind):
    model = make_tiny_model(tmp_path / "m", text={"model_type": kind, "rope_parameters": rope})
    check_max_tokens(ShardConfig(max_tokens=4096), model)
    longer = ShardConfig(max_tokens=4097)
    if limit is None:
        return check_max_tokens(longer, model)
    with pytest.raises(UserError, match=r"max_tokens=4097 is more than 4096, .*; set it to 4096 or less"):
        check_max_tokens(longer, model)
