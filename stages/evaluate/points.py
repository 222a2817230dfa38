"""The points that evaluation measures: which test tiles are compressed, by the router, by a rule or by
chance.

A control is one function in CONTROLS; it is asked once for each routed point, at the same number of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.draws import draw_order
from vico.inference.routing import absolute_rule, published_rule

UNLABELLED = -1


@dataclass(frozen=True, eq=False)
class EvaluatedTiles:
    """All tiles of the test samples, sample after sample in prompt order.

    Sample s has the tiles `starts[s]` to `starts[s + 1]`, `tiles_per_image[s]` of each picture.
    `p_compress_N` float32 is the router's probability; `ratio_N` float64 is each tile's own loss ratio, None
    where the ratio stage did not see all. `detail_N` float64 is the pixel measure of the pixel rule, None
    where there is no rule; `label_N` int8 is 1 keep, 0 compress, UNLABELLED where the router stage had none.
    """

    tiles_per_image: Sequence[tuple[int, ...]]
    p_compress_N: np.ndarray
    ratio_N: np.ndarray | None
    detail_N: np.ndarray | None = None
    label_N: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *(sum(tiles) for tiles in self.tiles_per_image)])

    @property
    def num_tiles_S(self) -> np.ndarray:
        return np.diff(self.starts)

    def by_sample(self, values_N: np.ndarray) -> list[np.ndarray]:
        return np.split(values_N, self.starts[1:-1])


@dataclass(frozen=True, eq=False)
class Point:
    """One entry of the result: which tiles it compresses, bool [N] for each of its replicates."""

    entry: str
    replicates: tuple[np.ndarray, ...]
    threshold: float | None = None


def random_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """As many tiles as the router compresses, drawn from all tiles alike."""
    order = draw_order("random control", seed, replicate, np.arange(len(routed_N)))
    return _first(order, routed_N)


def shuffled_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """The router's decisions of another sample with as many pictures and tiles: its habits without its
    eyes.
    """
    decisions = tiles.by_sample(routed_N)
    groups: dict[tuple[int, ...], list[int]] = {}
    for s, shape in enumerate(tiles.tiles_per_image):
        groups.setdefault(shape, []).append(s)
    given = list(decisions)
    for members in groups.values():
        order = draw_order("shuffled control", seed, replicate, np.asarray(members))
        for s, other in zip(members, order, strict=True):
            given[s] = decisions[members[other]]
    return np.concatenate(given) if given else routed_N


def oracle_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """The tiles whose own loss ratios are the smallest, as many as the router compresses."""
    return _first(np.argsort(tiles.ratio_N, kind="stable"), routed_N)


def pixel_choice(tiles: EvaluatedTiles, routed_N: np.ndarray, seed: int, replicate: int) -> np.ndarray:
    """The tiles with the least detail in their pixels, as many as the router compresses."""
    return _first(np.argsort(tiles.detail_N, kind="stable"), routed_N)


def _first(order: np.ndarray, routed_N: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(routed_N), bool)
    chosen[order[: int(routed_N.sum())]] = True
    return chosen


@dataclass(frozen=True)
class Control:
    """A way to choose tiles at the router's number of tokens; `drawn` ones are repeated over seeds.

    `needs` names the field of EvaluatedTiles without which there is no such choice.
    """

    choice: Callable[[EvaluatedTiles, np.ndarray, int, int], np.ndarray]
    drawn: bool
    needs: str = "p_compress_N"


CONTROLS: Mapping[str, Control] = {
    "random": Control(random_choice, drawn=True),
    "shuffled": Control(shuffled_choice, drawn=True),
    "pixel_rule": Control(pixel_choice, drawn=False, needs="detail_N"),
    "oracle": Control(oracle_choice, drawn=False, needs="ratio_N"),
}


def operating_points(
    tiles: EvaluatedTiles,
    thresholds: Sequence[float],
    served_threshold: float,
    relative_threshold: float,
    controls: Sequence[str],
    num_replicates: int,
    seed: int,
) -> list[Point]:
    """All points of the policy: both ends, the router at each threshold, the served rule, and the controls.

    A control's points stand in the order of the thresholds. A control that needs what `tiles` lacks has no
    point.
    """
    probability_N = torch.from_numpy(tiles.p_compress_N)
    num_tiles = len(probability_N)
    routed = [Point("routed", (absolute_rule(probability_N, t).numpy(),), t) for t in thresholds]
    calls = [
        published_rule(torch.from_numpy(call), relative_threshold, served_threshold).numpy()
        for call in tiles.by_sample(tiles.p_compress_N)
    ]
    served = np.concatenate([np.zeros(0, bool), *calls])
    points = [
        Point("full", (np.zeros(num_tiles, bool),)),
        Point("compressed", (np.ones(num_tiles, bool),)),
        *routed,
        Point("served", (served,), served_threshold),
    ]
    for name in controls:
        control = CONTROLS[name]
        if getattr(tiles, control.needs) is None:
            continue
        for point in routed:
            replicates = range(num_replicates if control.drawn else 1)
            chosen = (control.choice(tiles, point.replicates[0], seed, r) for r in replicates)
            points.append(Point(name, tuple(chosen), point.threshold))
    return points
