"""From losses at both rates to router labels: loss ratio, percentile, keep or compress (arXiv 2510.12793).

    r = L(y | tile at 1/16) / L(y | tile at 1/4)        label = compress iff r <= tau, else keep

tau is a percentile of r over a sliding window of the last tiles. Numpy only; the label stage calls this on
stored losses.

Shapes: N tiles, in labelling order.
"""

from bisect import bisect_left, insort
from collections import deque

import numpy as np

FLOOR = 1e-2
"""Nats per answer token, added to both losses. With 1e-4, ratios measured the reference's certainty."""
COMPRESS, KEEP = 0, 1


def loss_ratio(loss_compressed: np.ndarray, loss_full: np.ndarray, floor: float = FLOOR) -> np.ndarray:
    """Return ViCO's r = (L(compressed) + floor) / (L(full) + floor), float64; L in nats per answer token."""
    return (np.asarray(loss_compressed, np.float64) + floor) / (np.asarray(loss_full, np.float64) + floor)


def window_percentiles(ratios_N: np.ndarray, percentile: float, window_tiles: int) -> np.ndarray:
    """Return tau of each tile, float64 [N]: the percentile over its window.

    The window is the tile's ratio and up to `window_tiles` - 1 ratios before it. Equal to
    `numpy.percentile` with its default method (linear between the two nearest ranks), bit for bit. Raises
    ValueError for NaN, which has no rank.
    """
    values = np.asarray(ratios_N, np.float64).tolist()
    if np.isnan(values).any():
        raise ValueError("a ratio is NaN; a tile without a loss cannot be labelled")
    window: deque[float] = deque()
    ordered: list[float] = []
    taus_N = np.empty(len(values))
    for i, value in enumerate(values):
        if len(window) == window_tiles:
            del ordered[bisect_left(ordered, window.popleft())]
        window.append(value)
        insort(ordered, value)
        taus_N[i] = _percentile_of_sorted(ordered, percentile)
    return taus_N


def _percentile_of_sorted(ordered: list[float], percentile: float) -> float:
    position = (len(ordered) - 1) * (percentile / 100)
    below = int(position)
    low, high, share = ordered[below], ordered[min(below + 1, len(ordered) - 1)], position - below
    # numpy's own formula: exact at both ends and for low == high, so that ties stay ties
    return high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share


def tile_labels(ratios_N: np.ndarray, taus_N: np.ndarray) -> np.ndarray:
    """Return labels int8 [N]: 0 (compress) iff r <= tau, so that ties compress; else 1 (keep)."""
    return np.where(np.asarray(ratios_N) <= np.asarray(taus_N), COMPRESS, KEEP).astype(np.int8)


def share_near_tau(ratios_N: np.ndarray, taus_N: np.ndarray, margin: float = 0.05) -> float:
    """Return the share of uncertain labels: tiles whose ratio is within `margin` * tau of tau."""
    ratios, taus = np.asarray(ratios_N), np.asarray(taus_N)
    return float(np.mean(np.abs(ratios - taus) <= margin * taus)) if len(ratios) else 0.0
