"""The two MLP connectors between vision tokens and language model: pixel shuffle, and the compressed rate's
network.

The full rate keeps the pretrained model's own connector; the compressed one is new (ViCO) and has the
published shape.
"""

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


@torch.no_grad()
def start_from_full(connector: CompressedConnector, full: nn.Module) -> None:
    """Lays the weights of the pretrained full connector into the new one, in place.

    The new connector then gives about the mean of the full connector's tokens in each square of 2 x 2: its
    first layer holds the full one's twice, for the mean of the two upper and of the two lower tokens' inputs;
    the second gives the full one's output y and -y, the third their difference, as gelu(y) - gelu(-y) = y.
    What is not exact: one norm over all 16 vision tokens in place of four, and the means within the pairs.

    `full` has transformers' names (`layer_norm`, `linear_1`, `linear_2`). Draws nothing.
    """
    norm, first, second, last = connector[0], connector[1], connector[4], connector[7]
    width, half = full.linear_1.out_features, second.out_features // 2
    side = full.linear_1.weight.reshape(width, 2, 2, -1)
    # [rows of a token, columns of the square of two tokens, v]: the pair of one row of tokens
    pair = side.repeat(1, 1, 2, 1) / 2
    norm.weight.copy_(full.layer_norm.weight.reshape(2, 2, -1).repeat(2, 2, 1).flatten())
    norm.bias.copy_(full.layer_norm.bias.reshape(2, 2, -1).repeat(2, 2, 1).flatten())
    weight = torch.zeros_like(first.weight).reshape(2 * width, 2, 2, 4, -1)  # [.., pair, row, column, v]
    weight[:width, 0], weight[width:, 1] = pair, pair
    first.weight.copy_(weight.flatten(1))
    first.bias.copy_(full.linear_1.bias.repeat(2))
    mean = full.linear_2.weight.repeat(1, 2) / 2
    second.weight.copy_(torch.cat([mean, -mean]))
    second.bias.copy_(torch.cat([full.linear_2.bias, -full.linear_2.bias]))
    eye = torch.eye(half, dtype=last.weight.dtype, device=last.weight.device)
    last.weight.copy_(torch.cat([eye, -eye], dim=1))
    last.bias.zero_()
