"""Groups of parameters with one learning rate over the schedule's, and from which update on they get it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from stages.consistency import ConsistencyConfig
from stages.optimizer_config import OptimizerConfig
from vico.errors import UserError

CONNECTOR = "policy.compressed_connector."
_TOWER = "policy.base.model.vision_tower."
_LAYER = re.compile(re.escape(_TOWER) + r"encoder\.layer\.(\d+)\.")


@dataclass(frozen=True, order=True)
class Rate:
    """`lr_scale` times the schedule's learning rate from update `first_update` (counted from 0) on, zero
    before.

    At a learning rate of zero AdamW neither moves nor decays a parameter, but its moments take the gradients
    in: once the parameter is let go, its steps are those of a warm optimizer. (Without gradients the moments
    would be empty while their bias correction is spent, and the first steps several times too long.)
    """

    lr_scale: float = 1.0
    first_update: int = 0

    def at(self, learning_rate: float, update: int) -> float:
        """The learning rate in update `update`, the schedule being at `learning_rate`."""
        return learning_rate * self.lr_scale if update >= self.first_update else 0.0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate over the schedule's and a weight decay."""

    parameters: Sequence[nn.Parameter]
    rate: Rate
    weight_decay: float


def parameter_groups(
    module: nn.Module, optimizer: OptimizerConfig, rate_of: Callable[[str], Rate] = lambda name: Rate()
) -> list[ParameterGroup]:
    """Trainable parameters by the rate that `rate_of` gives their name and by weight decay.

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


def check_warmup(config: ConsistencyConfig, num_steps: int) -> None:
    """UserError where the connector's warm-up takes up all of the `num_steps` updates."""
    if config.connector_warmup_steps >= num_steps:
        raise UserError(
            f"consistency.connector_warmup_steps={config.connector_warmup_steps} leaves none of the "
            f"{num_steps} updates to the rest of the model; lower it, or raise epochs or max_steps"
        )


def consistency_rates(config: ConsistencyConfig, num_vision_layers: int) -> Callable[[str], Rate]:
    """The rate of each parameter of a ConsistencyTask by its name.

    The compressed connector gets `connector_lr_scale` and trains from the first update, all else from update
    `connector_warmup_steps` on. Of the vision tower's L layers (i from 0) layer i is scaled by
    `vision_lr_decay` ** (L - i), the embeddings by ** (L + 1), a norm after the last layer by 1 (the rule of
    BEiT, which InternVL's own training follows).
    """

    def rate(name: str) -> Rate:
        if name.startswith(CONNECTOR):
            return Rate(config.connector_lr_scale)
        depth = 0
        if layer := _LAYER.match(name):
            depth = num_vision_layers - int(layer.group(1))
        elif name.startswith(f"{_TOWER}embeddings."):
            depth = num_vision_layers + 1
        return Rate(config.vision_lr_decay**depth, config.connector_warmup_steps)

    return rate
