"""Bootstrap over test samples: the units that are drawn, and intervals over resamples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from data_prep.disjoint_sets import DisjointSets

# S samples, U units, B resamples, X columns, N tiles, G runs of tiles with equal scores
LEVEL = 0.95
MIN_GROUPS = 20
"""With at least this many groups, groups are the units; fewer give intervals that are too narrow."""
Unit = Literal["group", "picture", "sample"]


@dataclass(frozen=True, eq=False)
class Resampling:
    """B draws of U units with replacement; `unit_S` int64 is the unit of each sample.

    `unit` is "group" if samples that share their content (a record's `group`) are drawn together; samples
    without a group are then drawn together if they share a picture, as the answers to them are alike. With
    fewer than MIN_GROUPS groups all samples are drawn by their pictures: it is "picture", or "sample" if none
    share one, and the intervals ignore what the samples of each of the `num_groups` groups have in common.
    Every pass over `counts` gives the same draws, so statistics of two passes are paired.
    """

    unit_S: np.ndarray
    num_units: int
    num_resamples: int
    seed: int
    unit: Unit
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


def resampling(
    groups: Sequence[str], pictures: Sequence[Sequence[bytes]], num_resamples: int, seed: int
) -> Resampling:
    """Return the resampling of samples with these groups (an empty name means no group) and digests of
    pictures."""
    num_groups = len(set(groups) - {""})
    by_group = num_groups >= MIN_GROUPS
    own = groups if by_group else [""] * len(groups)
    first_with: dict[str | bytes, int] = {}
    pairs = [
        (sample, first_with.setdefault(name, sample))
        for sample, (group, digests) in enumerate(zip(own, pictures, strict=True))
        for name in ([group] if group else digests)
    ]
    sets = DisjointSets(len(groups))
    sets.join(*np.array(pairs, np.int64).reshape(-1, 2).T)
    units, unit_S = np.unique(sets.roots(np.arange(len(groups))), return_inverse=True)
    unit: Unit = "group" if by_group else "sample" if len(units) == len(groups) else "picture"
    return Resampling(unit_S, len(units), num_resamples, seed, unit, num_groups)


def units_of(samples: pa.Table) -> tuple[list[str], list[list[bytes]]]:
    """Return the groups and the digests of the pictures of rows of the index, for `resampling`."""
    return samples["group"].to_pylist(), samples["image_sha256"].to_pylist()


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
