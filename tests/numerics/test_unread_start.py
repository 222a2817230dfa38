"""A ZeRO-3 training whose models are read while they are spread equals one that reads them whole, bit for
bit: at the start, after a resume, and in the policy that it writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.numerics.ranks import finish, start_ranks
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model

MODULE = "tests.numerics.start_case"
MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
BFLOAT16 = {"optimizer": {"dtype": "bfloat16"}}
FAST = {"full": {"config": BFLOAT16, "resume": False}}
SLOW = {
    "full": {"config": BFLOAT16},
    "float32": {"config": {}},
    "random": {"config": {**BFLOAT16, "connector_start": "random"}},
    "frozen": {"config": {"train_vision": False}},
    "joint": {"config": {"train_vision": False}, "joint": True},
    "offloaded": {
        "config": BFLOAT16,
        "site": {"memory": {"zero_stage": 3, "offload": "parameters", "reference": "cpu"}},
    },
    "compiled": {
        "config": {},
        "site": {"memory": {"zero_stage": 3, "reference": "sharded"}, "compile": True},
    },
    "only the reference": {"config": {}, "site": {"memory": {"zero_stage": 2, "reference": "sharded"}}},
}


def started(cases, folder: Path, world_size: int, **model_options) -> Path:
    """Run every case in both ways; return the folder with their results."""
    model = make_tiny_model(folder / "model", **model_options)
    policy = load_model(model)
    policy.add_compressed_connector(1)
    with torch.no_grad():
        policy.base.model.vision_tower.embeddings.cls_token.add_(0.5)
    save_model(policy.state_dict(), model, folder / "start")
    out = folder / "out"
    arguments = [
        json.dumps({"name": name, "way": way, "resume": True, **case})
        for name, case in cases.items()
        for way in ("whole", "unread")
    ]
    ranks = start_ranks(MODULE, [str(model), str(folder / "start"), str(out), *arguments], out, world_size)
    finish(ranks, out)
    return out


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return started(FAST, tmp_path_factory.mktemp("fast"), 2, text=MOE, tied=False)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return started(SLOW, tmp_path_factory.mktemp("slow"), 2)


def test_experts_and_a_connector_from_the_full_one_start_and_train_the_same(fast):
    assert_same(fast, "full")


def test_a_rank_holds_one_whole_parameter_at_a_time(fast):
    tensors = load_file(fast / "full-unread/start.safetensors")
    largest = max(tensor.numel() for tensor in tensors.values())
    projector = sum(tensor.numel() for name, tensor in tensors.items() if "multi_modal_projector" in name)
    for rank in range(2):
        held = int((fast / f"full-unread/held-{rank}.txt").read_text())
        assert 0 < held <= largest + projector < sum(tensor.numel() for tensor in tensors.values()) / 3


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_every_start_is_the_same(slow, case):
    assert_same(slow, case)


@pytest.mark.slow
def test_three_ranks_start_the_same(tmp_path):
    assert_same(started({"full": {"config": {}}}, tmp_path, 3), "full")


def assert_same(out: Path, case: str) -> None:
    """Compare the tensors at the start, losses and norms of the updates, and the files of the policy."""
    whole, unread = (out / f"{case}-{way}" for way in ("whole", "unread"))
    expected, own = (load_file(folder / "start.safetensors") for folder in (whole, unread))
    assert own.keys() == expected.keys() and any(name.startswith("buffer.") for name in own)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    numbers, expected_numbers = (json.loads((f / "numbers.json").read_text()) for f in (unread, whole))
    assert numbers == expected_numbers
    assert len({loss for loss, _ in numbers}) == len(numbers) >= 2 and all(norm > 0 for _, norm in numbers)
    for file in ("model.safetensors", "config.json"):
        assert (unread / "policy" / file).read_bytes() == (whole / "policy" / file).read_bytes()
