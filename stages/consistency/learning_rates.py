"""The learning rate of each parameter relative to the schedule, and the update from which on it trains."""

import re
from collections.abc import Callable

from stages.consistency.config import ConsistencyConfig
from stages.training.parameter_groups import Rate
from vico.errors import UserError

CONNECTOR = "policy.compressed_connector."
_TOWER = "policy.base.model.vision_tower."
_LAYER = re.compile(re.escape(_TOWER) + r"encoder\.layer\.(\d+)\.")


def check_warmup(config: ConsistencyConfig, num_steps: int) -> None:
    """Raise UserError if the connector's warm-up takes up all of the `num_steps` updates."""
    if config.connector_warmup_steps >= num_steps:
        raise UserError(
            f"consistency.connector_warmup_steps={config.connector_warmup_steps} leaves none of the "
            f"{num_steps} updates to the rest of the model; lower it, or raise epochs or max_steps"
        )


def consistency_rates(config: ConsistencyConfig, num_vision_layers: int) -> Callable[[str], Rate]:
    """Return a function from the name of a parameter of a ConsistencyTask to its rate.

    The compressed connector has the factor `connector_lr_scale` and trains from the first update; everything
    else trains from update `connector_warmup_steps` on. In a vision tower of L layers (i from 0), layer i has
    the factor `vision_lr_decay` ** (L - i), the embeddings ** (L + 1), and a norm after the last layer 1.
    This is the rule of BEiT, which InternVL's own training follows.
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
