"""The new connector, started from the full one, gives the mean of its tokens; exact for smooth pictures."""

import pytest
import torch

from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.model.connectors import start_from_full
from vico.model.internvl import VicoModel


@pytest.fixture
def model(tmp_path):
    model = load_model(make_tiny_model(tmp_path / "m"))
    model.add_compressed_connector(0)
    projector = model.base.model.multi_modal_projector
    with torch.no_grad():
        for parameter in projector.parameters():  # biases and norms as after training, not 0 and 1
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    start_from_full(model.compressed_connector, projector)
    return model.eval()


def mean_of_squares(tokens_NFD: torch.Tensor) -> torch.Tensor:
    num_tiles, num_tokens, width = tokens_NFD.shape
    side = round(num_tokens**0.5)
    grid = tokens_NFD.reshape(num_tiles, side // 2, 2, side // 2, 2, width)
    return grid.mean(dim=(2, 4)).reshape(num_tiles, -1, width)


def smooth_features(model: VicoModel) -> torch.Tensor:
    """Return vision tokens [N, P, v] that are equal within the square of a compressed token."""
    num_tokens, width = model.settings.vision_tokens, model.vision_width
    side = round(num_tokens**0.5) // 4
    drawn = torch.randn(3, side, 4, side, 4, width, generator=torch.Generator().manual_seed(0))
    return drawn[:, :, :1, :, :1].expand(3, side, 4, side, 4, width).reshape(3, num_tokens, width)


@torch.no_grad()
def test_it_gives_the_mean_of_the_full_tokens_for_equal_neighbours(model):
    smooth = smooth_features(model)
    expected = mean_of_squares(model.full_tokens(smooth))
    torch.testing.assert_close(model.compressed_tokens(smooth), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_different_rows_of_the_square_still_give_the_mean(model):
    """Columns are equal, rows differ; rows have the same mean and spread, so their shared norm is exact."""
    smooth = smooth_features(model)
    side = round(smooth.shape[1] ** 0.5)
    rows = smooth.reshape(3, side // 4, 4, side, -1).clone()
    rows[:, :, 2:] = rows[:, :, 2:].flip(-1)
    rows = rows.reshape(smooth.shape)
    expected = mean_of_squares(model.full_tokens(rows))
    torch.testing.assert_close(model.compressed_tokens(rows), expected, rtol=1e-4, atol=1e-5)
