"""The learning rate that belongs to the size of an update, and the warning about one that is far above it.

The InternVL3.5 SFT scripts train with 8e-5 and updates of 512 packs of 32,768 tokens. With AdamW the rate
follows the square root of an update's size (Malladi et al. 2022, On the SDEs and scaling rules for adaptive
gradient algorithms).
"""

import math

from stages.consistency.config import ConsistencyConfig

_RATE, _PACKS, _PACK_TOKENS = 8e-5, 512, 32768
_TOLERATED = 2.0
"""How far above the rule a rate may be before it is worth a warning."""
_SMALL = 10**8
"""Parameters below which a model stands higher rates than the published ones; the demo's has 4M."""


def rate_by_rule(config: ConsistencyConfig) -> float:
    """Return the learning rate that belongs to updates of this size."""
    packs = config.packs_per_step * config.reference_tokens_per_pack / _PACK_TOKENS
    return _RATE * math.sqrt(packs / _PACKS)


def rate_warning(config: ConsistencyConfig, num_parameters: int, block: str = "consistency") -> str | None:
    """Return a warning if a model of a published size would train at more than twice that rate."""
    rate, rule = config.optimizer.learning_rate, rate_by_rule(config)
    if num_parameters < _SMALL or rate <= _TOLERATED * rule:
        return None
    return (
        f"{block}.optimizer.learning_rate={rate:g} is {rate / rule:.1f} times what belongs to packs_per_step="
        f"{config.packs_per_step} of {config.reference_tokens_per_pack} tokens ({_RATE:g} belongs to "
        f"{_PACKS} packs of {_PACK_TOKENS} and follows the square root); set {rule:.1e}, or more "
        "packs_per_step"
    )
