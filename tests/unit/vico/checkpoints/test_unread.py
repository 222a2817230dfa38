"""A model that is opened without reading weights has the values, buffers and ties of one that is read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model_folders import routed_model, written_folder
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model, open_unread
from vico.checkpoints.write import write_published_folder
from vico.errors import UserError
from vico.model.unread import UnreadParameter, read_all, values_of

EMBEDDING = "language_model.model.embed_tokens.weight"
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "qwen3 tied": {},
    "qwen2 untied": {"tied": False, "text": {"model_type": "qwen2"}},
    "llama untied": {"tied": False, "text": {"model_type": "llama"}},
    "qwen3_moe": {"tied": False, "text": {"model_type": "qwen3_moe", **MOE}},
    "q/k norm": {"vision": {"use_qk_norm": True, "norm_type": "rms_norm", "qk_norm_eps": 1e-3}},
}


def assert_same_model(folder, dtype):
    """Compare every parameter, buffer and constant of both ways to open the folder."""
    unread, whole = open_unread(folder, dtype), load_model(folder, dtype)
    parameters = dict(unread.named_parameters(remove_duplicate=False))
    expected = dict(whole.named_parameters(remove_duplicate=False))
    assert parameters.keys() == expected.keys()
    assert all(isinstance(p, UnreadParameter) and p.is_meta for p in parameters.values())
    first_parts = {name: next(n for n, q in expected.items() if q is p) for name, p in expected.items()}
    for name, parameter in parameters.items():
        assert parameter is parameters[first_parts[name]], f"{name} is tied differently"
        torch.testing.assert_close(values_of(parameter), expected[name].data, rtol=0, atol=0)
    read_all(unread.parameters())
    assert not any(isinstance(p, UnreadParameter) for p in unread.parameters())
    assert parameters["base.lm_head.weight"] is unread.lm_head.weight, "a read parameter is the same object"
    states = unread.state_dict(), whole.state_dict()
    assert all(torch.equal(state, states[1][name]) for name, state in states[0].items())
    buffers, expected_buffers = dict(unread.named_buffers()), dict(whole.named_buffers())
    assert buffers and buffers.keys() == expected_buffers.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected_buffers[name], rtol=0, atol=0)
    assert not unread.training and [type(part) for part in unread.modules()] == [
        type(part) for part in whole.modules()
    ]
    epsilons = (
        [getattr(part, "variance_epsilon", None) for part in model.modules()] for model in (unread, whole)
    )
    assert next(epsilons) == next(epsilons)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_unread_parameters_have_the_values_that_a_read_model_has(tmp_path, model, dtype):
    assert_same_model(make_tiny_model(tmp_path / "m", **MODELS[model]), dtype)


def test_connector_and_router_of_a_published_folder(tmp_path):
    routed = routed_model(make_tiny_model(tmp_path / "base"), tmp_path / "routed")
    assert_same_model(routed, torch.float32)
    assert_same_model(written_folder(write_published_folder, routed, tmp_path / "flash"), torch.bfloat16)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_twice_is_tied_if_its_values_are_equal(tmp_path, same):
    folder = make_tiny_model(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.lm_head.weight"] = tensors[EMBEDDING] + (0 if same else 1)
    save_file(tensors, path, {"format": "pt"})
    assert_same_model(folder, torch.float32)


def test_a_new_connector_of_an_unread_model_has_values(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    models = [open_model(folder, torch.bfloat16) for open_model in (open_unread, load_model)]
    for model in models:
        model.add_compressed_connector(3)
    own, expected = (model.compressed_connector.state_dict() for model in models)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_file_that_was_cut_after_the_model_was_opened_is_named(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    model, path = open_unread(folder), folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors became shorter while it was read"):
        read_all(model.parameters())
