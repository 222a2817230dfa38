"""Drop path (stochastic depth) in a vision tower that transformers builds without one."""

from torch import nn


class DropPath:
    """A forward hook that leaves out a branch of a residual block for some tiles.

    In training each tile drops the branch with `probability`; where it stays it is divided by the probability
    of staying. The draws come from torch's generator, which training seeds by (seed, step, pack).
    """

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, module: nn.Module, _arguments, output):
        if not module.training or not self.probability:
            return None
        branch_NPv = output[0] if isinstance(output, tuple) else output
        kept = 1.0 - self.probability
        mask_N11 = branch_NPv.new_empty(len(branch_NPv), 1, 1).bernoulli_(kept).div_(kept)
        dropped_NPv = branch_NPv * mask_N11
        return (dropped_NPv, *output[1:]) if isinstance(output, tuple) else dropped_NPv


def add_drop_path(tower: nn.Module, probability: float) -> None:
    """Puts drop path on attention and MLP of every layer: 0 in the first, `probability` in the last, linear
    in between, as in InternViT's `drop_path_rate`."""
    layers = tower.encoder.layer
    for number, layer in enumerate(layers):
        drop = DropPath(probability * number / max(len(layers) - 1, 1))
        # What comes after the branch (layer scale) is linear, so dropping before it is dropping the branch.
        for branch in (layer.attention, layer.mlp):
            branch.register_forward_hook(drop)
