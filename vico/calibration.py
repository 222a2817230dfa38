"""The absolute threshold of the router and how good its scores are: pure functions of labels and
probabilities."""

# N tiles

import numpy as np


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
