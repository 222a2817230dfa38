"""The points that the evaluation measures: which test tiles each control compresses at each threshold.

A control of `stages/controls.py` has one choice function in CHOICES. It is asked once per routed point, for
the same number of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data_prep.draws import draw_order
from stages.controls import (
    BLIND_ORACLE,
    BY_NAME,
    COMPARED,
    COMPRESSED,
    FEWER_TILES,
    FULL,
    ORACLE,
    PIXEL_RULE,
    RANDOM,
    ROUTED,
    SEEING_ORACLE,
    SERVED,
    SHUFFLED,
    Control,
)
from stages.evaluate.config import EvaluateConfig
from vico.inference.routing import absolute_rule, published_rule

# N tiles, S samples
UNLABELLED = -1


@dataclass(frozen=True, eq=False)
class EvaluatedTiles:
    """All tiles of the test samples, sample after sample in prompt order.

    Sample s has the tiles `starts[s]` to `starts[s + 1]`, `tiles_per_image[s]` of each image. `p_compress_N`
    float32 is the router's probability to compress. `ratio_N` float64 is each tile's own loss ratio, None if
    the ratio stage did not see all of them. `pixel_score_N` float64 is the pixel rule's log-odds of keep,
    None without a rule. `blind_ratio_N` float64 is the tile's loss ratio over other questions, nan
    without any, None if no tile has one. `label_N` int8 is 1 keep, 0 compress, UNLABELLED if the router
    stage had none. `contents` names what each tile shows, None if its record does not say so.
    """

    tiles_per_image: Sequence[tuple[int, ...]]
    p_compress_N: np.ndarray
    ratio_N: np.ndarray | None
    pixel_score_N: np.ndarray | None = None
    label_N: np.ndarray | None = None
    contents: Sequence[str | None] = ()
    blind_ratio_N: np.ndarray | None = None
    retiled_S: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Number of tiles of each sample, int64 [S], with at most so many tiles per picture."""

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *(sum(tiles) for tiles in self.tiles_per_image)])

    @property
    def num_tiles_S(self) -> np.ndarray:
        return np.diff(self.starts)

    def by_sample(self, values_N: np.ndarray) -> list[np.ndarray]:
        """Return the values of each sample's tiles."""
        return np.split(values_N, self.starts[1:-1])


@dataclass(frozen=True, eq=False)
class Point:
    """One point of a control: the tiles it compresses, bool [N] per replicate, and the threshold.

    With `max_tiles`, pictures have at most so many tiles, all at the full rate; N is then their number.
    """

    control: Control
    replicates: tuple[np.ndarray, ...]
    threshold: float | None = None
    max_tiles: int | None = None

    def by_sample(self, tiles: EvaluatedTiles, compressed_N: np.ndarray) -> list[np.ndarray]:
        """Return a replicate's decisions for each sample's tiles."""
        if self.max_tiles is None:
            return tiles.by_sample(compressed_N)
        return np.split(compressed_N, np.cumsum(tiles.retiled_S[self.max_tiles])[:-1])


Choice = Callable[[EvaluatedTiles, np.ndarray, int, int], np.ndarray]
"""(tiles, the router's decisions bool [N], seed, replicate) -> decisions bool [N] at as many tokens."""


def random_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """Choose as many tiles as the router compresses, uniformly from all tiles."""
    order = draw_order("random control", seed, replicate, np.arange(len(routed_N)))
    return _first(order, routed_N)


def shuffled_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """Give each sample the router's decisions for another sample with as many images and tiles.

    This keeps the router's habits without its view of the picture.
    """
    decisions = tiles.by_sample(routed_N)
    samples_by_shape: dict[tuple[int, ...], list[int]] = {}
    for s, shape in enumerate(tiles.tiles_per_image):
        samples_by_shape.setdefault(shape, []).append(s)
    shuffled = list(decisions)
    for samples in samples_by_shape.values():
        order = draw_order("shuffled control", seed, replicate, np.asarray(samples))
        for s, other in zip(samples, order, strict=True):
            shuffled[s] = decisions[samples[other]]
    return np.concatenate(shuffled) if shuffled else routed_N


def oracle_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """Choose the tiles with the smallest loss ratios, as many as the router compresses."""
    return _smallest(tiles.ratio_N, routed_N)


def blind_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """Choose the tiles with the smallest loss ratios over other questions.

    Of the tiles with such a ratio it chooses as many as the router; the others keep the router's decisions.
    """
    return _smallest_of_blind(tiles, tiles.blind_ratio_N, routed_N)


def seeing_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """Choose as `blind_choice` does, by the tiles' own loss ratios."""
    return _smallest_of_blind(tiles, tiles.ratio_N, routed_N)


def _smallest_of_blind(
    tiles: EvaluatedTiles, values_N: np.ndarray | None, routed_N: np.ndarray
) -> np.ndarray:
    assert tiles.blind_ratio_N is not None and values_N is not None
    known = np.flatnonzero(np.isfinite(tiles.blind_ratio_N))
    chosen = routed_N.copy()
    chosen[known] = _smallest(values_N[known], routed_N[known])
    return chosen


def pixel_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """Choose the tiles with the lowest scores of the pixel rule, as many as the router compresses."""
    return _smallest(tiles.pixel_score_N, routed_N)


def _smallest(values_N: np.ndarray | None, routed_N: np.ndarray) -> np.ndarray:
    assert values_N is not None, "operating_points leaves out a control whose measure is missing"
    return _first(np.argsort(values_N, kind="stable"), routed_N)


def _first(order: np.ndarray, routed_N: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(routed_N), bool)
    chosen[order[: int(routed_N.sum())]] = True
    return chosen


CHOICES: Mapping[Control, Choice] = {
    RANDOM: random_choice,
    SHUFFLED: shuffled_choice,
    PIXEL_RULE: pixel_choice,
    BLIND_ORACLE: blind_choice,
    SEEING_ORACLE: seeing_choice,
    ORACLE: oracle_choice,
}


def operating_points(
    tiles: EvaluatedTiles, config: EvaluateConfig, thresholds: Sequence[float], calibrated: float
) -> list[Point]:
    """Return all points of the policy: both ends, the router at each threshold, the served rule, the
    controls.

    The served rule uses the `calibrated` threshold. A control's points are in the order of the thresholds. A
    control that needs a measure that `tiles` lacks has no points.
    """
    num_tiles = len(tiles.p_compress_N)
    routed = routed_points(tiles, thresholds)
    points = [
        Point(FULL, (np.zeros(num_tiles, bool),)),
        Point(COMPRESSED, (np.ones(num_tiles, bool),)),
        *routed,
        served_point(tiles, config.relative_threshold, calibrated),
    ]
    for control in measured_controls(config):
        if getattr(tiles, control.needs) is not None:
            points += [control_point(control, tiles, point, config) for point in routed]
    return [*points, *fewer_tiles_points(tiles)]


def routed_points(tiles: EvaluatedTiles, thresholds: Sequence[float]) -> list[Point]:
    """Return the router's point at each threshold."""
    probability_N = torch.from_numpy(tiles.p_compress_N)
    return [Point(ROUTED, (absolute_rule(probability_N, t).numpy(),), t) for t in thresholds]


def measured_controls(config: EvaluateConfig) -> list[Control]:
    """Return the compared controls that the config names; the blind oracle brings the seeing one."""
    named = {BY_NAME[name] for name in config.controls}
    if BLIND_ORACLE in named:
        named.add(SEEING_ORACLE)
    return [control for control in COMPARED if control in named]


def fewer_tiles_points(tiles: EvaluatedTiles) -> list[Point]:
    """Return a point for each number of tiles in `retiled_S`, all tiles at the full rate."""
    return [
        Point(FEWER_TILES, (np.zeros(int(counts_S.sum()), bool),), max_tiles=max_tiles)
        for max_tiles, counts_S in tiles.retiled_S.items()
    ]


def served_point(tiles: EvaluatedTiles, relative_threshold: float, absolute_threshold: float) -> Point:
    """Return the point of the published rule, applied to the tiles of each sample as one prompt."""
    decisions = [
        published_rule(torch.from_numpy(p_compress), relative_threshold, absolute_threshold).numpy()
        for p_compress in tiles.by_sample(tiles.p_compress_N)
    ]
    return Point(SERVED, (np.concatenate([np.zeros(0, bool), *decisions]),), absolute_threshold)


def control_point(control: Control, tiles: EvaluatedTiles, routed: Point, config: EvaluateConfig) -> Point:
    """Return the control's point at as many tokens as the routed point."""
    num_replicates = config.num_replicates if control.is_random else 1
    choose = CHOICES[control]
    chosen = (choose(tiles, routed.replicates[0], config.seed, r) for r in range(num_replicates))
    return Point(control, tuple(chosen), routed.threshold)
