"""Intervals of quality kept and of the router's AUC, and comparisons of the router with its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from stages.controls import (
    ALL,
    BLIND_ORACLE,
    COMPARED,
    COMPRESSED,
    FEWER_TILES,
    FULL,
    ORACLE,
    RANDOM,
    ROUTED,
    SEEING_ORACLE,
    Control,
    points_of,
)
from stages.evaluate.points import UNLABELLED, EvaluatedTiles
from stages.evaluate.resampling import LEVEL, Resampling, interval, ranked_tiles
from stages.evaluate.scores import PointScores

# B the test samples and the resamples, P points, S samples, T positions on the axis of tokens saved, N tiles
HEADLINE_SHARE = 2 / 3  # of the tiles compressed: half of the tokens if a compressed tile has a quarter
_CURVE_POSITIONS = 61


class Difference(TypedDict):
    """Quality kept by the router minus that of a control, with its interval."""

    difference: float | None
    interval: list[float] | None


class RouterAuc(TypedDict):
    """AUC of the router over the labelled test tiles."""

    auc: float | None
    auc_interval: list[float] | None
    num_tiles: int


@dataclass(frozen=True, eq=False)
class ResampledPoints:
    """Quality kept, exact matches and tokens saved of every point, as shares. Row 0 is of the test
    samples, the others are of resamples.

    `quality_BP` is nan if the reference's similarity is 0.
    """

    scored: Sequence[PointScores]
    quality_BP: np.ndarray
    exact_BP: np.ndarray
    saved_BP: np.ndarray

    def columns(self, control: Control) -> list[int]:
        """Return the columns of the control's points."""
        return [p for p, scores in enumerate(self.scored) if scores.point.control is control]

    def curve_at(self, control: Control, saved_BT: np.ndarray) -> np.ndarray:
        """Return the quality kept at `saved_BT` tokens saved, float64 [B, T].

        It is interpolated linearly between the control's points and both ends, which nearly all controls
        share. It is nan above the largest saving of a control without the low end.
        """
        low_end = self.columns(COMPRESSED) if control.has_low_end else []
        columns = [*self.columns(FULL), *self.columns(control), *low_end]
        quality_BT = np.empty_like(saved_BT)
        for b, saved_T in enumerate(saved_BT):
            saved_P, quality_P = self.saved_BP[b, columns], self.quality_BP[b, columns]
            order = np.argsort(saved_P, kind="stable")
            right = None if control.has_low_end else np.nan
            quality_BT[b] = np.interp(saved_T, saved_P[order], quality_P[order], right=right)
        return quality_BT


def resampled_points(
    scored: Sequence[PointScores], num_tiles_S: np.ndarray, saving_per_tile: float, resampling: Resampling
) -> ResampledPoints:
    """Measure every point over the test samples and over each resample; `scored` begins with the reference.

    `saving_per_tile` is the share of its tokens that a compressed tile saves.
    """
    similarity_SP, exact_SP = (
        np.stack([scores.scores[name].mean(axis=0) for scores in scored], axis=1)
        for name in ("similarity", "exact_match")
    )
    saved_SP = np.stack(
        [
            scores.num_compressed.mean(axis=0) * saving_per_tile + scores.num_dropped_S  # in tiles
            for scores in scored
        ],
        axis=1,
    )
    totals_S2 = np.stack([num_tiles_S, np.ones_like(num_tiles_S)], axis=1)
    columns_SX = np.concatenate([similarity_SP, exact_SP, saved_SP, totals_S2], axis=1)
    sums_BX = np.concatenate([columns_SX.sum(axis=0)[None], resampling.sums(columns_SX)])
    similarity_BP, exact_BP, saved_BP, totals_B2 = np.split(
        sums_BX, [len(scored), 2 * len(scored), 3 * len(scored)], axis=1
    )
    tiles_B1, samples_B1 = np.split(totals_B2, 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        quality_BP = np.where(similarity_BP[:, :1] > 0, similarity_BP / similarity_BP[:, :1], np.nan)
        saved_BP = np.where(tiles_B1 > 0, saved_BP / tiles_B1, 0.0)
    return ResampledPoints(scored, quality_BP, exact_BP / samples_B1, saved_BP)


def add_intervals(metrics: Mapping[str, Any], points: ResampledPoints) -> None:
    """Add `quality_kept_interval` and `exact_match_interval` to every point of the metrics."""
    for control in ALL:
        for point, column in zip(points_of(metrics, control), points.columns(control), strict=True):
            point["quality_kept_interval"] = interval(points.quality_BP[1:, column])
            point["exact_match_interval"] = interval(points.exact_BP[1:, column])


def comparisons(points: ResampledPoints, saving_per_tile: float) -> dict[str, Any]:
    """Return `gap_closed`, `routed_minus` and `oracle_split`, each at one measured point and over the curve.

    The point is the routed one whose share of compressed tiles is nearest to HEADLINE_SHARE; the controls are
    taken at the same tokens saved. Over the curve, quality is averaged over all tokens that can be saved, 0
    to `saving_per_tile`. gap_closed = (routed - random) / (oracle - random), null unless the oracle is above
    random.
    """
    distances = {
        column: abs(points.saved_BP[0, column] / saving_per_tile - HEADLINE_SHARE)
        for column in points.columns(ROUTED)
    }
    if not distances:
        return {"gap_closed": None, "routed_minus": None, "oracle_split": None}
    nearest = min(distances, key=distances.__getitem__)
    at_point, over_curve = _quality_kept(points, nearest, saving_per_tile)
    position = {
        "threshold": points.scored[nearest].point.threshold,
        "tokens_saved": float(points.saved_BP[0, nearest]),
    }
    return {
        "gap_closed": {
            "at_point": {**position, **gap_closed(at_point)},
            "over_curve": gap_closed(over_curve),
        },
        "routed_minus": {
            "at_point": {**position, **differences(at_point)},
            "over_curve": differences(over_curve),
        },
        "oracle_split": oracle_split(at_point, over_curve, position),
    }


def _quality_kept(
    points: ResampledPoints, nearest: int, saving_per_tile: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the quality kept [B] by router and controls, at the point `nearest` and over the curve."""
    along_curve_BT = np.tile(np.linspace(0, saving_per_tile, _CURVE_POSITIONS), (len(points.saved_BP), 1))
    at_point_B1 = points.saved_BP[:, nearest : nearest + 1]
    at_point, over_curve = {}, {}
    for control in (ROUTED, *COMPARED, FEWER_TILES):
        if points.columns(control):
            at_point[control.name] = points.curve_at(control, at_point_B1)[:, 0]
            over_curve[control.name] = points.curve_at(control, along_curve_BT).mean(axis=1)
    at_point[ROUTED.name] = points.quality_BP[:, nearest]
    return at_point, over_curve


def gap_closed(kept: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the quality kept by routed, random and oracle, and the share of the gap with its interval."""
    routed, random, oracle = ROUTED.name, RANDOM.name, ORACLE.name
    means = {name: _number(kept[name][0]) for name in (routed, random, oracle) if name in kept}
    if len(means) < 3:
        return {**means, "share": None, "interval": None}
    gap_B = kept[oracle] - kept[random]
    with np.errstate(invalid="ignore", divide="ignore"):
        share_B = np.where(gap_B > 0, (kept[routed] - kept[random]) / gap_B, np.nan)
    return {**means, "share": _number(share_B[0]), "interval": interval(share_B[1:])}


def differences(kept: Mapping[str, np.ndarray]) -> dict[str, Difference]:
    """Return the router's difference from each control, by the control's name."""
    routed_B = kept[ROUTED.name]
    return {name: _difference(routed_B, quality_B) for name, quality_B in kept.items() if name != ROUTED.name}


def oracle_split(
    at_point: Mapping[str, np.ndarray], over_curve: Mapping[str, np.ndarray], position: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the distance from the router to the oracle in two parts, with intervals, None without a blind
    oracle.

    `better_router` is what a router that ranks like the blind oracle would win, `question` what only the
    question tells: the oracle on the same tiles minus the blind one.
    """
    if BLIND_ORACLE.name not in at_point:
        return None

    def parts(kept: Mapping[str, np.ndarray]) -> dict[str, Difference]:
        routed, blind, seeing = (kept[c.name] for c in (ROUTED, BLIND_ORACLE, SEEING_ORACLE))
        return {"better_router": _difference(blind, routed), "question": _difference(seeing, blind)}

    return {"at_point": {**position, **parts(at_point)}, "over_curve": parts(over_curve)}


def _difference(first_B: np.ndarray, second_B: np.ndarray) -> Difference:
    return {
        "difference": _number(first_B[0] - second_B[0]),
        "interval": interval(first_B[1:] - second_B[1:]),
    }


def router_auc(tiles: EvaluatedTiles, resampling: Resampling) -> RouterAuc:
    """Return the AUC of the router's order of the labelled tiles, first the least to be compressed."""
    if tiles.label_N is None or (tiles.label_N == UNLABELLED).all():
        return {"auc": None, "auc_interval": None, "num_tiles": 0}
    unit_N = np.repeat(resampling.unit_S, tiles.num_tiles_S)
    labelled_N = tiles.label_N != UNLABELLED
    ranked = ranked_tiles(
        # not 1 - p: in float32 that is the same for all small p
        unit_N[labelled_N],
        tiles.label_N[labelled_N] == 1,
        -tiles.p_compress_N[labelled_N],
    )
    auc_B = np.array([ranked.auc(counts_U) for counts_U in resampling.counts()])
    auc = ranked.auc(np.ones(resampling.num_units))
    return {"auc": _number(auc), "auc_interval": interval(auc_B), "num_tiles": int(labelled_N.sum())}


def interval_basis(resampling: Resampling) -> dict[str, float | str]:
    """Return what the intervals are based on: level, resamples, units and groups."""
    return {
        "level": LEVEL,
        "resamples": resampling.num_resamples,
        "unit": resampling.unit,
        "num_units": resampling.num_units,
        "num_groups": resampling.num_groups,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
