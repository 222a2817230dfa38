"""The two MLP connectors between vision tower and language model, and the pixel shuffle before both.

The full rate keeps the pretrained connector (published as `mlp1`, 1/4 of the vision tokens). The compressed
rate has ViCO's new one (`mlp2`, 1/16 of them), in the shape of the published Flash checkpoints.

Shapes: N tiles, P vision tokens per tile, v vision width, D language width.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector


def pixel_shuffle(features_NPv: torch.Tensor, factor: int) -> torch.Tensor:
    """Merge squares of factor x factor vision tokens: [N, P, v] -> [N, P / factor^2, v * factor^2].

    Computes InternVL's pixel shuffle (`ps_version` v2). Raises ValueError unless the tokens form a square
    whose side is a multiple of `factor`.
    """
    num_tiles, num_tokens, width = features_NPv.shape
    side = round(num_tokens**0.5)
    if side * side != num_tokens or side % factor:
        raise ValueError(f"{num_tokens} vision tokens do not form a square whose side {factor} divides")
    coarse = side // factor
    # Output channels run over (row in square, column in square, v), output tokens over (row, column).
    grid = features_NPv.reshape(num_tiles, coarse, factor, coarse, factor, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(num_tiles, coarse * coarse, factor * factor * width)


class CompressedConnector(nn.Sequential):
    """Map pixel-shuffled vision tokens [N, P / 16, 16 v] to language tokens [N, P / 16, D].

    The layer numbers, and so the parameter names, are those of the published `mlp2`.
    """

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

    def trainable_layers(self) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear, nn.Linear]:
        """Return the four layers with parameters, in the order of the forward pass."""
        norm, first, _, _, second, _, _, last = self
        assert isinstance(norm, nn.LayerNorm) and isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear) and isinstance(last, nn.Linear)
        return norm, first, second, last


@torch.no_grad()
def start_from_full(connector: CompressedConnector, full: "InternVLMultiModalProjector") -> None:
    """Initialise the new connector in place from the weights of the pretrained full connector.

    The new connector then returns approximately the mean of the full connector's tokens in each square of 2
    x 2: the first layer holds the full connector's first layer twice, for the mean input of the two upper
    and of the two lower tokens; the second layer returns the full connector's output y and -y; the third
    takes their difference, as gelu(y) - gelu(-y) = y. Two approximations remain: one norm over all 16
    vision tokens instead of four norms, and the mean of inputs instead of outputs within each pair. No
    random numbers are drawn.
    """
    norm, first, second, last = connector.trainable_layers()
    width, half = full.linear_1.out_features, second.out_features // 2
    square = full.linear_1.weight.reshape(width, 2, 2, -1)  # [width, row, column, v]
    row_pair = square.repeat(1, 1, 2, 1) / 2  # two neighbouring tokens: [width, row, 4 columns, v]
    norm.weight.copy_(full.layer_norm.weight.reshape(2, 2, -1).repeat(2, 2, 1).flatten())
    norm.bias.copy_(full.layer_norm.bias.reshape(2, 2, -1).repeat(2, 2, 1).flatten())
    weight = torch.zeros_like(first.weight).reshape(2 * width, 2, 2, 4, -1)  # [.., pair, row, column, v]
    weight[:width, 0], weight[width:, 1] = row_pair, row_pair
    first.weight.copy_(weight.flatten(1))
    first.bias.copy_(full.linear_1.bias.repeat(2))
    mean = full.linear_2.weight.repeat(1, 2) / 2
    second.weight.copy_(torch.cat([mean, -mean]))
    second.bias.copy_(torch.cat([full.linear_2.bias, -full.linear_2.bias]))
    identity = torch.eye(half, dtype=last.weight.dtype, device=last.weight.device)
    last.weight.copy_(torch.cat([identity, -identity], dim=1))
    last.bias.zero_()
