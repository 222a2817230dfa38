"""Which tiles to compress, given the router's P(compress) of each: our rule and the published one.

Shapes: N tiles.
"""

import torch


def absolute_rule(compress_probability_N: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return bool [N]: compress iff P(compress) >= threshold.

    Each tile is decided alone, so the result does not depend on the batch.
    """
    return compress_probability_N >= threshold


def published_rule(
    compress_probability_N: torch.Tensor, relative_threshold: float, absolute_threshold: float
) -> torch.Tensor:
    """Return bool [N]: the rule of the published Flash checkpoints, over all tiles of one call.

    Compress iff P(compress) > quantile(P(compress) over the call, relative) and P(compress) >= absolute. At
    least one tile of every call is kept, so a call with a single tile never compresses it.
    """
    if not len(compress_probability_N):
        return torch.zeros(0, dtype=torch.bool, device=compress_probability_N.device)
    probability_N = compress_probability_N.float()  # torch.quantile does not support bfloat16
    above_quantile = probability_N > torch.quantile(probability_N, relative_threshold)
    return above_quantile & (probability_N >= absolute_threshold)
