"""Parameters grouped by learning rate and weight decay, for the optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from stages.training.optimizer import OptimizerConfig


@dataclass(frozen=True, order=True)
class Rate:
    """`lr_scale` times the schedule's learning rate from update `first_update` (counted from 0) on, zero
    before.

    With a learning rate of zero, AdamW neither moves nor decays a parameter, but its moments collect the
    gradients. When the parameter starts to train, its steps are those of a warm optimizer. (Without
    gradients, the moments would be empty while their bias correction has expired, and the first steps several
    times too long.)
    """

    lr_scale: float = 1.0
    first_update: int = 0

    def at(self, learning_rate: float, update: int) -> float:
        """Return the learning rate in update `update`, with the schedule at `learning_rate`."""
        return learning_rate * self.lr_scale if update >= self.first_update else 0.0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a rate and a weight decay."""

    parameters: Sequence[nn.Parameter]
    rate: Rate
    weight_decay: float


def parameter_groups(
    module: nn.Module, optimizer: OptimizerConfig, rate_of: Callable[[str], Rate] = lambda name: Rate()
) -> list[ParameterGroup]:
    """Return the trainable parameters, grouped by weight decay and by the rate that `rate_of` gives their
    name.

    Vectors (biases, norms, layer scales) do not decay.
    """
    buckets: dict[tuple[Rate, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            buckets.setdefault((rate_of(name), parameter.ndim > 1), []).append(parameter)
    return [
        ParameterGroup(parameters, rate, optimizer.weight_decay if decay else 0.0)
        for (rate, decay), parameters in sorted(buckets.items(), key=lambda bucket: bucket[0])
    ]
