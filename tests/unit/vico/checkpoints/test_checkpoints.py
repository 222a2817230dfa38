"""Model folders: equal after writing and reading; damage is named before a weight is used."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.errors import UserError


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", tied=request.param)


@pytest.fixture
def folder(base, tmp_path):
    """A saved model with a connector."""
    model = load_model(base)
    model.add_compressed_connector(1)
    model.router = None
    save_model(model.state_dict(), base, tmp_path / "m", {"threshold": 0.25})
    return tmp_path / "m"


def test_round_trip_keeps_every_bit(base, folder):
    saved, loaded = load_model(base), load_model(folder)
    saved.add_compressed_connector(1)
    expected = saved.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not loaded.training and not loaded.compressed_connector.training


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(folder):
    key = "model.multi_modal_projector.linear_1.weight"
    rewrite(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=f"1 missing tensors in the weights: {re.escape(key)}"):
        load_model(folder)


def test_a_surplus_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"1 surplus tensors in the weights: model\.extra"):
        load_model(folder)


def test_a_missing_connector_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("compressed_connector.7.bias"))
    with pytest.raises(UserError, match=r"compressed_connector\.7\.bias"):
        load_model(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(folder)
