"""Which tiles to compress, given the router's P(compress) of each: our rule and the published one."""

import numpy as np
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


def calibrated_threshold(compress_probability_N: np.ndarray, share: float) -> float:
    """The threshold at which `compress iff p0 >= threshold` compresses `share` of these tiles, as near as
    ties allow.

    It lies midway between two neighbouring scores, so that rounding on another machine moves no tile of
    the data.
    """
    scores = np.sort(np.asarray(compress_probability_N, np.float64))[::-1]
    if not len(scores):
        raise ValueError("no tiles to calibrate the threshold on")
    # Places where the sorted scores can be cut: equal scores stay together.
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(scores)) + 1, [len(scores)]])
    count = int(cuts[np.argmin(np.abs(cuts - share * len(scores)))])
    if count == 0:
        if scores[0] >= 1:  # what it is compared with are float32 scores
            return float(np.nextafter(np.float32(scores[0]), np.float32(2)))
        return float((scores[0] + 1) / 2)
    if count == len(scores):
        return float(scores[-1] / 2)
    return float((scores[count - 1] + scores[count]) / 2)


def expected_calibration_error(
    probability_N: np.ndarray, is_positive_N: np.ndarray, num_bins: int = 10
) -> float:
    """ECE: mean over equal-width bins, weighted by size, of |share of positives - mean probability|."""
    probability, positive = np.asarray(probability_N, np.float64), np.asarray(is_positive_N, np.float64)
    bins = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    error = 0.0
    for number in np.unique(bins):
        inside = bins == number
        error += inside.mean() * abs(positive[inside].mean() - probability[inside].mean())
    return float(error)
