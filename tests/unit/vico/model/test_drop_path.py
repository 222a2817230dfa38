"""Drop path in the vision tower: which tiles lose a branch, how the others are scaled, the random draws."""

import pytest
import torch

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.model.drop_path import DropPath, add_drop_path

NUM_TILES = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("drop") / "m")


def test_a_tile_keeps_its_branch_scaled_or_loses_it_completely():
    module = torch.nn.Identity().train()
    module.register_forward_hook(DropPath(0.25))
    branch = torch.randn(NUM_TILES, 5, 3)
    torch.manual_seed(0)
    output = module(branch)
    lost = (output == 0).all(dim=(1, 2))
    torch.testing.assert_close(output[~lost], branch[~lost] / 0.75)
    assert 0.15 < lost.float().mean() < 0.35
    assert torch.equal(module.eval()(branch), branch)


def test_the_first_layer_never_drops_and_the_last_one_does(folder):
    tower = load_model(folder).base.model.vision_tower.train()
    add_drop_path(tower, 0.5)
    first, last = tower.encoder.layer
    plain = load_model(folder).base.model.vision_tower.encoder.layer
    hidden = torch.randn(NUM_TILES, 17, 32)
    torch.manual_seed(0)
    assert torch.equal(first(hidden), plain[0](hidden))
    unchanged = (last(hidden) == hidden).all(dim=(1, 2)).float().mean()
    assert 0.15 < unchanged < 0.35  # both branches dropped: a quarter


def test_draws_follow_the_seed_and_evaluation_has_none(folder):
    model = load_model(folder)
    pixels = torch.randn(8, 3, 56, 56)
    plain = model.vision_features(pixels)
    add_drop_path(model.base.model.vision_tower, 0.5)
    assert torch.equal(model.vision_features(pixels), plain)
    model.train()

    def features(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.vision_features(pixels)

    assert torch.equal(features(1), features(1))
    assert not torch.equal(features(1), features(2))


def test_recomputed_layers_draw_the_same(folder):
    """With activation checkpointing, the backward pass must drop the same tiles as the forward pass."""
    pixels = torch.randn(8, 3, 56, 56)
    gradients = []
    for checkpointing in (False, True):
        model = load_model(folder).train()
        add_drop_path(model.base.model.vision_tower, 0.5)
        if checkpointing:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.vision_features(pixels).square().sum().backward()
        gradients.append(model.base.model.vision_tower.encoder.layer[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)
