"""Routers that the rates stage refuses: without a threshold, of another policy, for another vision width."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from stages.inference import load_router
from stages.outputs import METRICS_FILE, POLICY_FOLDER, ROUTER_FILE
from stages.rates.config import RatesConfig
from stages.rates.stage import run
from stages.router_files import policy_mark
from tests.stage_context import stage_context
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.errors import UserError
from vico.model.router import Router


@pytest.fixture
def inputs(tmp_path):
    """Return the inputs of a rates stage: policy and router of each other, no shards."""
    policy = tmp_path / "consistency" / POLICY_FOLDER
    policy.parent.mkdir()
    make_tiny_model(policy)
    router = tmp_path / "router"
    router.mkdir()
    model = load_model(policy)
    model.add_router(1)
    tensors = {f"router.{name}": tensor for name, tensor in model.router.state_dict().items()}
    save_file(tensors, router / ROUTER_FILE, policy_mark(policy))
    (router / METRICS_FILE).write_text(json.dumps({"absolute_threshold": 0.5}))
    return {"consistency": policy.parent, "router": router, "model": policy, "shard": tmp_path}


def refusal(inputs, tmp_path) -> str:
    with pytest.raises(UserError) as raised:
        run(RatesConfig(), stage_context("joint_rates", tmp_path / "runs", inputs))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "content", ["{}", '{"absolute_threshold": null}', '{"absolute_threshold": NaN}', "[]"]
)
def test_a_router_without_a_threshold_is_refused(inputs, tmp_path, content):
    (inputs["router"] / METRICS_FILE).write_text(content)
    assert "is not a threshold, so the router chooses no rates" in refusal(inputs, tmp_path)


def test_a_router_of_another_policy_is_refused(inputs, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=4)
    shutil.copyfile(other / "model.safetensors", inputs["model"] / "model.safetensors")
    message = refusal(inputs, tmp_path)
    assert "trained on vision features and losses of another policy than" in message
    assert str(inputs["model"]) in message


def test_a_router_for_another_vision_width_is_refused_in_one_line(inputs):
    tensors = {f"router.{name}": tensor for name, tensor in Router(64).state_dict().items()}
    save_file(tensors, inputs["router"] / ROUTER_FILE)
    assert load_file(inputs["router"] / ROUTER_FILE)
    with pytest.raises(UserError, match=r"tokens of width 64, but the policy's vision tower gives \d+;"):
        load_router(load_model(inputs["model"]), inputs["router"] / ROUTER_FILE)
