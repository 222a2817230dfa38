"""Bootstrap over test samples: which of them move together, and a statistic's interval over resamples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MIN_GROUPS = 20
"""From so many groups on they are the units: a bootstrap over fewer says little, and is too narrow."""


@dataclass(frozen=True, eq=False)
class Resampling:
    """B draws of U units with replacement; `unit_S` int64 is the unit of each sample.

    `unit` is "group" where samples that share their content (a record's `group`) are drawn together; a sample
    without a group is then a unit by itself. It is "sample" where there are no groups or fewer than
    MIN_GROUPS; what the `num_groups` groups have in common is not in the intervals then.
     Every pass over `counts` gives the same draws, so statistics of
    two passes are paired.
    """

    unit_S: np.ndarray
    num_units: int
    num_resamples: int
    seed: int
    unit: str
    num_groups: int

    def counts(self) -> Iterator[np.ndarray]:
        """How often each unit was drawn, int64 [U], resample after resample."""
        random = np.random.default_rng([self.seed, self.num_units])
        for _ in range(self.num_resamples):
            yield np.bincount(random.integers(self.num_units, size=self.num_units), minlength=self.num_units)

    def sums(self, values_SX: np.ndarray) -> np.ndarray:
        """Sums of the columns over the samples of each resample, float64 [B, X]."""
        by_unit_UX = np.zeros((self.num_units, values_SX.shape[1]))
        np.add.at(by_unit_UX, self.unit_S, values_SX)
        return np.stack([counts_U @ by_unit_UX for counts_U in self.counts()])


def resampling(groups: Sequence[str], num_resamples: int, seed: int) -> Resampling:
    """The resampling of samples with these groups; an empty group stands for none."""
    num_groups = len(set(groups) - {""})
    by_group = num_groups >= MIN_GROUPS
    names = [group if group and by_group else f"\0{number}" for number, group in enumerate(groups)]
    units, unit_S = np.unique(names, return_inverse=True)
    return Resampling(unit_S, len(units), num_resamples, seed, "group" if by_group else "sample", num_groups)


def interval(values_B: np.ndarray) -> list[float] | None:
    """[low, high] of the middle 95 % of a statistic's resamples.

    A resample in which it is not defined (nan) counts as the worst at both ends; null where an end is then
    not defined itself.
    """
    undefined = np.isnan(values_B)
    tail = (1 - LEVEL) / 2
    low = np.quantile(np.where(undefined, -np.inf, values_B), tail, method="lower")
    high = np.quantile(np.where(undefined, np.inf, values_B), 1 - tail, method="higher")
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None


@dataclass(frozen=True, eq=False)
class RankedTiles:
    """Labelled tiles in the order of falling scores, to take the area under the ROC curve at many weights."""

    unit_N: np.ndarray
    keep_N: np.ndarray
    first_of_run_G: np.ndarray

    def auc(self, counts_U: np.ndarray) -> float:
        """AUC with each tile as often as its unit was drawn, ties counted half; nan without both labels."""
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
    """Tiles of the units with `keep_N` bool and the score that should rank keep above compress."""
    order = np.argsort(-score_N, kind="stable")
    scores = score_N[order]
    first = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]])) if len(scores) else []
    return RankedTiles(unit_N[order], keep_N[order], np.asarray(first, np.int64))
