"""The two MLP connectors between vision tokens and language model: pixel shuffle, and the compressed rate's
network.

The full rate keeps the pretrained model's own connector; the compressed one is new (ViCO) and has the
published shape.
"""

# N tiles, P vision tokens of a tile, v vision width, h language width

import torch
from torch import nn


def pixel_shuffle(features_NPv: torch.Tensor, factor: int) -> torch.Tensor:
    """[N, P, v] -> [N, P / factor^2, v * factor^2]: each square of factor x factor tokens becomes one
    (InternVL, ps_version v2)."""
    num_tiles, num_tokens, width = features_NPv.shape
    side = round(num_tokens**0.5)
    if side * side != num_tokens or side % factor:
        raise ValueError(f"{num_tokens} vision tokens are no square whose side {factor} divides")
    coarse = side // factor
    # Output channels run over (row in square, column in square, v), output tokens over (row, column).
    grid = features_NPv.reshape(num_tiles, coarse, factor, coarse, factor, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(num_tiles, coarse * coarse, factor * factor * width)


class CompressedConnector(nn.Sequential):
    """Pixel-shuffled vision tokens [N, P/16, 16 v] -> [N, P/16, h]; layer numbers are those of the published
    `mlp2`."""

    def __init__(self, vision_width: int, language_width: int, dropout: float = 0.1):
        width_in, width = 16 * vision_width, 2 * language_width
        super().__init__(
            nn.LayerNorm(width_in),
            nn.Linear(width_in, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, language_width),
        )
