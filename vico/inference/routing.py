"""Which tiles to compress, given the router's P(compress) of each: our rule and the published one.

Shapes: N tiles.
"""

import numpy as np
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


def calibrated_threshold(compress_probability_N: np.ndarray, share: float) -> float:
    """Return the threshold of `absolute_rule` that compresses `share` of the tiles, as closely as ties allow.

    It is the midpoint of two neighbouring scores, so that another machine's rounding changes no decision.
    Raises ValueError without tiles.
    """
    scores = np.sort(np.asarray(compress_probability_N, np.float64))[::-1]
    if not len(scores):
        raise ValueError("no tiles to calibrate the threshold on")
    # Positions at which the sorted scores can be cut: equal scores stay together.
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(scores)) + 1, [len(scores)]])
    num_compressed = int(cuts[np.argmin(np.abs(cuts - share * len(scores)))])
    if num_compressed == 0:
        if scores[0] >= 1:  # the scores that it is compared with are float32
            return float(np.nextafter(np.float32(scores[0]), np.float32(2)))
        return float((scores[0] + 1) / 2)
    if num_compressed == len(scores):
        return float(scores[-1] / 2)
    return float((scores[num_compressed - 1] + scores[num_compressed]) / 2)


def expected_calibration_error(
    probability_N: np.ndarray, is_positive_N: np.ndarray, num_bins: int = 10
) -> float:
    """Return the expected calibration error (ECE).

    It is the mean over equal-width bins, weighted by size, of |share of positives - mean probability|.
    """
    probability, positive = np.asarray(probability_N, np.float64), np.asarray(is_positive_N, np.float64)
    bins = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    error = 0.0
    for number in np.unique(bins):
        inside = bins == number
        error += inside.mean() * abs(positive[inside].mean() - probability[inside].mean())
    return float(error)
