"""Bootstrap over test samples: the units that are drawn, and intervals over resamples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# S samples, U units, B resamples, X columns, N tiles, G runs of tiles with equal scores
LEVEL = 0.95
MIN_GROUPS = 20
"""With at least this many groups, groups are the units; fewer give intervals that are too narrow."""


@dataclass(frozen=True, eq=False)
class Resampling:
    """B draws of U units with replacement; `unit_S` int64 is the unit of each sample.

    `unit` is "group" if samples that share their content (a record's `group`) are drawn together; a sample
    without a group is then a unit of its own. It is "sample" if there are fewer than MIN_GROUPS groups; the
    intervals then ignore what the samples of each of the `num_groups` groups have in common. Every pass over
    `counts` gives the same draws, so statistics of two passes are paired.
    """

    unit_S: np.ndarray
    num_units: int
    num_resamples: int
    seed: int
    unit: str
    num_groups: int

    def counts(self) -> Iterator[np.ndarray]:
        """Yield how often each unit was drawn, int64 [U], one array per resample."""
        random = np.random.default_rng([self.seed, self.num_units])
        for _ in range(self.num_resamples):
            yield np.bincount(random.integers(self.num_units, size=self.num_units), minlength=self.num_units)

    def sums(self, values_SX: np.ndarray) -> np.ndarray:
        """Return the sums of the columns over the samples of each resample, float64 [B, X]."""
        by_unit_UX = np.zeros((self.num_units, values_SX.shape[1]))
        np.add.at(by_unit_UX, self.unit_S, values_SX)
        return np.stack([counts_U @ by_unit_UX for counts_U in self.counts()])


def resampling(groups: Sequence[str], num_resamples: int, seed: int) -> Resampling:
    """Return the resampling of samples with these groups; an empty name means no group."""
    num_groups = len(set(groups) - {""})
    by_group = num_groups >= MIN_GROUPS
    names = [group if group and by_group else f"\0{number}" for number, group in enumerate(groups)]
    units, unit_S = np.unique(names, return_inverse=True)
    return Resampling(unit_S, len(units), num_resamples, seed, "group" if by_group else "sample", num_groups)


def interval(values_B: np.ndarray) -> list[float] | None:
    """Return [low, high] of the middle 95 % of a statistic's resamples.

    A resample in which the statistic is undefined (nan) counts as the worst value at both ends. The interval
    is None if an end is then undefined.
    """
    undefined = np.isnan(values_B)
    tail = (1 - LEVEL) / 2
    low = np.quantile(np.where(undefined, -np.inf, values_B), tail, method="lower")
    high = np.quantile(np.where(undefined, np.inf, values_B), 1 - tail, method="higher")
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None


@dataclass(frozen=True, eq=False)
class RankedTiles:
    """Labelled tiles by falling score, for the area under the ROC curve with many sets of weights."""

    unit_N: np.ndarray
    keep_N: np.ndarray
    first_of_run_G: np.ndarray

    def auc(self, counts_U: np.ndarray) -> float:
        """Return the AUC with each tile weighted by its unit's count, ties counted half.

        It is nan unless both labels occur.
        """
        weights_N = counts_U[self.unit_N].astype(np.float64)
        keep_G, other_G = (
            np.add.reduceat(weights_N * side, self.first_of_run_G) for side in (self.keep_N, ~self.keep_N)
        )
        pairs = keep_G.sum() * other_G.sum()
        if not pairs:
            return float("nan")
        above_G = np.cumsum(keep_G) - keep_G
        return float((other_G * (above_G + keep_G / 2)).sum() / pairs)


def ranked_tiles(unit_N: np.ndarray, keep_N: np.ndarray, score_N: np.ndarray) -> RankedTiles:
    """Rank at least one tile by a score that should be higher for keep (`keep_N` bool) than for compress."""
    order = np.argsort(-score_N, kind="stable")
    scores = score_N[order]
    first_of_run_G = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    return RankedTiles(unit_N[order], keep_N[order], first_of_run_G)
