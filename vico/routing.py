"""Which tiles to compress, given the router's P(compress) of each: our rule and the published one."""

# N tiles of one call

import torch


def absolute_rule(compress_probability_N: torch.Tensor, threshold: float) -> torch.Tensor:
    """bool [N]: compress iff P(compress) >= threshold. Each tile by itself, so the answer is the same in any
    batch.
    """
    return compress_probability_N >= threshold


def published_rule(
    compress_probability_N: torch.Tensor, relative_threshold: float, absolute_threshold: float
) -> torch.Tensor:
    """bool [N]: the rule of the published Flash checkpoints, over all tiles of one call.

    Compress iff P(compress) > quantile(P(compress) over the call, relative) and P(compress) >= absolute. At
    least one tile of every call is kept, so a tile alone in its call is never compressed.
    """
    if not len(compress_probability_N):
        return torch.zeros(0, dtype=torch.bool, device=compress_probability_N.device)
    probability = compress_probability_N.float()  # torch.quantile takes no bfloat16
    above_quantile = probability > torch.quantile(probability, relative_threshold)
    return above_quantile & (probability >= absolute_threshold)
