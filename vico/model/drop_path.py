"""Drop path (stochastic depth) for the vision tower of transformers, which has none.

Shapes: N tiles, P vision tokens per tile, v vision width.
"""

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

# the output of an MLP, or of attention: its tokens [N, P, v] first, then attention weights or None
BranchOutput: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]


class DropPath:
    """A forward hook that drops a branch of a residual block for random tiles.

    In training, each tile drops the branch with `probability`, and kept branches are divided by the
    probability of keeping. The draws come from torch's generator, which training seeds by (seed, step,
    pack).
    """

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(
        self, module: nn.Module, _arguments: tuple[object, ...], output: BranchOutput
    ) -> BranchOutput | None:
        """Return the branch with dropped tiles at zero, or None to leave it unchanged."""
        if not module.training or not self.probability:
            return None
        branch_NPv = output[0] if isinstance(output, tuple) else output
        keep_probability = 1.0 - self.probability
        mask_N11 = branch_NPv.new_empty(len(branch_NPv), 1, 1).bernoulli_(keep_probability)
        dropped_NPv = branch_NPv * mask_N11.div_(keep_probability)
        return (dropped_NPv, *output[1:]) if isinstance(output, tuple) else dropped_NPv


def add_drop_path(tower: "InternVLVisionModel", probability: float) -> None:
    """Add drop path to attention and MLP of every layer, as InternViT's `drop_path_rate` does.

    The probability rises linearly from 0 in the first layer to `probability` in the last.
    """
    layers = tower.encoder.layer
    for number, layer in enumerate(layers):
        drop = DropPath(probability * number / max(len(layers) - 1, 1))
        # The layer scale after the branch is linear, so dropping before it drops the branch.
        for branch in ("attention", "mlp"):
            layer.get_submodule(branch).register_forward_hook(drop)
