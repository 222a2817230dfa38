"""Calibration of a router: the threshold for a wanted share of tiles, and how true its probabilities are.

Shapes: N tiles, B blank tiles, K bins.
"""

from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.02
"""Default of `share_tolerance`: the share of tiles by which a threshold may miss the wanted share."""
THIN_MARGIN = 0.005
"""Log-odds. In bfloat16 the log-odds of 766 tiles of the small model are 0.004 away from those in float32
(median; 0.03 at the 99th percentile)."""
_RESOLUTION = 2.0**-24  # of a float32 probability below 1


@dataclass(frozen=True)
class Threshold:
    """A threshold on P(compress): tiles at or above it are compressed.

    `share` is the share of the calibration tiles that it compresses, `margin` the distance in log-odds to the
    nearest score of any calibration or blank tile (infinite without one), `num_blank_kept` the number of
    blank tiles below it.
    """

    value: float
    share: float
    margin: float
    num_blank_kept: int


def log_odds(probability_N: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)), float64 [N], finite: p is clipped to the resolution of float32."""
    p_N = np.clip(np.asarray(probability_N, np.float64), _RESOLUTION, 1 - _RESOLUTION)
    return np.log(p_N) - np.log1p(-p_N)


def placed_threshold(
    compress_probability_N: np.ndarray,
    share: float,
    tolerance: float = TOLERANCE,
    blank_probability_B: np.ndarray | None = None,
) -> Threshold:
    """Return the threshold that compresses `share` of the tiles, within `tolerance` if ties allow.

    Of the gaps between scores within the tolerance, it takes those that leave the fewest blank tiles below,
    then the widest one in log-odds, and its middle: rounding on another machine, or a tile that differs a
    little, then changes no decision. A threshold for all tiles or none is used only if `share` is 1 or 0, or
    if all scores are equal. Raises ValueError without tiles, and for a score that is not finite.
    """
    real = np.sort(np.asarray(compress_probability_N, np.float64))[::-1]
    if not len(real):
        raise ValueError("no tiles to calibrate the threshold on")
    blank = np.asarray([] if blank_probability_B is None else blank_probability_B, np.float64)
    if not (np.isfinite(real).all() and np.isfinite(blank).all()):
        raise ValueError("a score is not finite; a tile without a probability has no place in the order")
    scores = np.unique(np.concatenate([real, blank]))[::-1]
    # of a cut below each score
    shares = 1 - np.searchsorted(real[::-1], scores, side="left") / len(real)
    num_kept = np.searchsorted(np.sort(blank), scores, side="left")
    upper, lower = np.concatenate([[1.0], scores]), np.concatenate([scores, [0.0]])
    shares, num_kept = np.concatenate([[0.0], shares]), np.concatenate([[len(blank)], num_kept])
    distances = np.abs(shares - share)
    inner = np.flatnonzero((shares > 0) & (shares < 1))
    cuts = inner if len(inner) and 0 < share < 1 else np.arange(len(shares))
    allowed = cuts[distances[cuts] <= max(tolerance, distances[cuts].min()) + 1e-12]
    gaps = log_odds(upper) - log_odds(lower)
    best = min(allowed, key=lambda cut: (num_kept[cut], -gaps[cut], distances[cut]))
    value = _middle(upper[best], lower[best])
    others = np.concatenate([real, blank])
    margin = float(np.abs(log_odds(others) - log_odds(np.array([value]))).min())
    return Threshold(value, float(np.mean(real >= value)), margin, int(np.sum(blank < value)))


def _middle(upper: float, lower: float) -> float:
    """Return a threshold above `lower` and at most `upper`: midway in log-odds, if float32 can tell."""
    if lower >= 1:  # all scores are 1: only a threshold above it keeps them
        return float(np.nextafter(np.float32(1), np.float32(2)))
    if upper >= 1 or lower <= 0:
        return float((upper + lower) / 2)
    odds = float(log_odds(np.array([upper, lower])).mean())
    value = float(1 / (1 + np.exp(-odds)))
    if np.float32(value) <= np.float32(lower):  # tiles are compared in float32: there it would be `lower`
        value = float(np.nextafter(np.float32(lower), np.float32(2)))
    return value if lower < value <= upper else float((upper + lower) / 2)


def share_near(compress_probability_N: np.ndarray, threshold: float, margin: float) -> float:
    """Return the share of tiles whose log-odds are within `margin` of the threshold's."""
    if not len(compress_probability_N):
        return 0.0
    distance_N = np.abs(log_odds(compress_probability_N) - log_odds(np.array([threshold])))
    return float(np.mean(distance_N <= margin))


@dataclass(frozen=True, eq=False)
class Reliability:
    """Tiles by predicted probability in K bins that have any: their number, mean probability and share of
    positives."""

    counts_K: np.ndarray
    predicted_K: np.ndarray
    observed_K: np.ndarray

    @property
    def error(self) -> float:
        """Return the expected calibration error (ECE): the mean of |observed - predicted| over all tiles."""
        if not len(self.counts_K):
            return 0.0
        gaps_K = np.abs(self.observed_K - self.predicted_K)
        return float((self.counts_K * gaps_K).sum() / self.counts_K.sum())


def reliability(probability_N: np.ndarray, is_positive_N: np.ndarray, num_bins: int = 10) -> Reliability:
    """Return how often tiles are positive by their predicted probability, in bins of equal width."""
    probability, positive = np.asarray(probability_N, np.float64), np.asarray(is_positive_N, np.float64)
    bins = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    used = [bins == number for number in np.unique(bins)]
    return Reliability(
        np.array([inside.sum() for inside in used]),
        np.array([probability[inside].mean() for inside in used]),
        np.array([positive[inside].mean() for inside in used]),
    )
