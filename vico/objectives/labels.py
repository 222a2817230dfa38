"""From losses at both rates to labels: floored ratio, sliding-window percentile tau, keep or compress.

Numpy only; the label stage runs these over stored losses.
"""

from bisect import bisect_left, insort
from collections import deque

import numpy as np

FLOOR = (
    1e-2  # nats per answer token; 1e-4 ranked tiles by how certain the reference was, not by what they hold
)
COMPRESS, KEEP = 0, 1


def loss_ratio(loss_compressed: np.ndarray, loss_full: np.ndarray, floor: float = FLOOR) -> np.ndarray:
    """ViCO's r = L(compressed) / L(full), float64, with `floor` (nats per answer token) added to both
    terms.
    """
    return (np.asarray(loss_compressed, np.float64) + floor) / (np.asarray(loss_full, np.float64) + floor)


def window_percentiles(ratios_N: np.ndarray, percentile: float, window_tiles: int) -> np.ndarray:
    """tau of each tile, float64 [N]: the percentile of its own ratio and the up to `window_tiles` - 1 before
    it.

    Percentile as `numpy.percentile` defines it by default (linear between the two nearest ranks), bit for
    bit. NaN raises ValueError: it has no rank.
    """
    values = np.asarray(ratios_N, np.float64).tolist()
    if np.isnan(values).any():
        raise ValueError("a ratio is NaN; a tile without a loss cannot be labelled")
    window: deque[float] = deque()
    ordered: list[float] = []
    taus = np.empty(len(values))
    for i, value in enumerate(values):
        if len(window) == window_tiles:
            del ordered[bisect_left(ordered, window.popleft())]
        window.append(value)
        insort(ordered, value)
        taus[i] = _percentile_of_sorted(ordered, percentile)
    return taus


def _percentile_of_sorted(ordered: list[float], percentile: float) -> float:
    position = (len(ordered) - 1) * (percentile / 100)
    below = int(position)
    low, high, share = ordered[below], ordered[min(below + 1, len(ordered) - 1)], position - below
    # numpy's own form: exact at both ends, and at low == high, so that ties stay ties
    return high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share


def tile_labels(ratios_N: np.ndarray, taus_N: np.ndarray) -> np.ndarray:
    """int8 [N]: 0 (compress) iff r <= tau, so that ties compress; else 1 (keep)."""
    return np.where(np.asarray(ratios_N) <= np.asarray(taus_N), COMPRESS, KEEP).astype(np.int8)


def share_near_tau(ratios_N: np.ndarray, taus_N: np.ndarray, margin: float = 0.05) -> float:
    """Share of tiles whose ratio lies within `margin` of its tau: labels that little would turn over."""
    ratios, taus = np.asarray(ratios_N), np.asarray(taus_N)
    return float(np.mean(np.abs(ratios - taus) <= margin * taus)) if len(ratios) else 0.0
