"""How sure the evaluation is: intervals of quality kept and of the router's AUC, and how much of the way from
random choice to the oracle the router goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.evaluate.points import UNLABELLED, EvaluatedTiles
from stages.evaluate.resampling import LEVEL, Resampling, interval, ranked_tiles
from stages.evaluate.scores import LISTED, PointScores

RIVALS = ("random", "shuffled", "pixel_rule", "oracle")
HEADLINE_SHARE = 2 / 3  # of the tiles compressed: half of the tokens where a tile falls to a quarter
_PLACES = 61


@dataclass(frozen=True, eq=False)
class ResampledPoints:
    """Quality kept and tokens saved of every point: row 0 over the test samples, the others over resamples.

    `quality_BP` is nan where the reference has no similarity to keep.
    """

    scored: Sequence[PointScores]
    quality_BP: np.ndarray
    saved_BP: np.ndarray

    def numbers(self, entry: str) -> list[int]:
        return [n for n, found in enumerate(self.scored) if found.point.entry == entry]

    def curve_at(self, entry: str, places_BT: np.ndarray) -> np.ndarray:
        """Quality kept at `places_BT` tokens saved, float64 [B, T]: straight lines between the entry's points
        and both ends, which all ways to choose have in common.
        """
        numbers = [*self.numbers("full"), *self.numbers(entry), *self.numbers("compressed")]
        found = np.empty_like(places_BT)
        for b, places_T in enumerate(places_BT):
            saved_K, quality_K = self.saved_BP[b, numbers], self.quality_BP[b, numbers]
            order = np.argsort(saved_K, kind="stable")
            found[b] = np.interp(places_T, saved_K[order], quality_K[order])
        return found


def resampled_points(
    scored: Sequence[PointScores], num_tiles_S: np.ndarray, saving_a_tile: float, resampling: Resampling
) -> ResampledPoints:
    """Every point over the test samples and over each resample; `scored` begins with the reference.

    `saving_a_tile` is the share of its tokens that a compressed tile saves.
    """
    similarity_SP = np.stack([found.scores["similarity"].mean(axis=0) for found in scored], axis=1)
    compressed_SP = np.stack([found.num_compressed.mean(axis=0) for found in scored], axis=1)
    columns_SX = np.concatenate([similarity_SP, compressed_SP, num_tiles_S[:, None]], axis=1)
    sums_BX = np.concatenate([columns_SX.sum(axis=0)[None], resampling.sums(columns_SX)])
    similarity_BP, compressed_BP, tiles_B1 = np.split(sums_BX, [len(scored), 2 * len(scored)], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        quality_BP = np.where(similarity_BP[:, :1] > 0, similarity_BP / similarity_BP[:, :1], np.nan)
        saved_BP = np.where(tiles_B1 > 0, compressed_BP / tiles_B1 * saving_a_tile, 0.0)
    return ResampledPoints(scored, quality_BP, saved_BP)


def add_intervals(metrics: dict, points: ResampledPoints) -> None:
    """Puts `quality_kept_interval` into every entry of the metrics."""
    for name in ("reference", "full", "compressed", *LISTED):
        entries = metrics[name] if name in LISTED else [metrics[name]]
        for found, number in zip(entries, points.numbers(name), strict=True):
            found["quality_kept_interval"] = interval(points.quality_BP[1:, number])


def comparisons(points: ResampledPoints, saving_a_tile: float) -> dict:
    """`gap_closed` and `routed_minus`, each at one measured point and over the curve.

    At the point: the routed one whose share of compressed tiles is nearest to HEADLINE_SHARE, against each
    control at the same tokens saved. Over the curve: means over all tokens that can be saved, 0 to
    `saving_a_tile`. gap_closed = (routed - random) / (oracle - random), null where the oracle is not above
    random.
    """
    routed = points.numbers("routed")
    nearest = min(
        routed, key=lambda n: abs(points.saved_BP[0, n] / saving_a_tile - HEADLINE_SHARE), default=None
    )
    if nearest is None:
        return {"gap_closed": None, "routed_minus": None}
    along_BT = np.tile(np.linspace(0, saving_a_tile, _PLACES), (len(points.saved_BP), 1))
    at_point_B1 = points.saved_BP[:, nearest : nearest + 1]
    kept: dict[str, dict[str, np.ndarray]] = {"at_point": {}, "over_curve": {}}
    for name in ("routed", *RIVALS):
        if points.numbers(name):
            kept["at_point"][name] = points.curve_at(name, at_point_B1)[:, 0]
            kept["over_curve"][name] = points.curve_at(name, along_BT).mean(axis=1)
    kept["at_point"]["routed"] = points.quality_BP[:, nearest]
    point = points.scored[nearest].point
    place = {"threshold": point.threshold, "tokens_saved": float(points.saved_BP[0, nearest])}
    return {
        "gap_closed": {
            "at_point": {**place, **gap_closed(kept["at_point"])},
            "over_curve": gap_closed(kept["over_curve"]),
        },
        "routed_minus": {
            "at_point": {**place, **differences(kept["at_point"])},
            "over_curve": differences(kept["over_curve"]),
        },
    }


def gap_closed(kept: dict[str, np.ndarray]) -> dict:
    """Quality kept of routed, random and oracle, and the share of the gap with its interval."""
    means = {name: _number(kept[name][0]) for name in ("routed", "random", "oracle") if name in kept}
    if len(means) < 3:
        return {**means, "share": None, "interval": None}
    gap_B = kept["oracle"] - kept["random"]
    with np.errstate(invalid="ignore", divide="ignore"):
        share_B = np.where(gap_B > 0, (kept["routed"] - kept["random"]) / gap_B, np.nan)
    return {**means, "share": _number(share_B[0]), "interval": interval(share_B[1:])}


def differences(kept: dict[str, np.ndarray]) -> dict:
    """Quality kept by the router less that of each control, with its interval."""
    return {
        name: {
            "difference": _number(kept["routed"][0] - values_B[0]),
            "interval": interval(kept["routed"][1:] - values_B[1:]),
        }
        for name, values_B in kept.items()
        if name != "routed"
    }


def router_auc(tiles: EvaluatedTiles, resampling: Resampling) -> dict:
    """AUC of the router over the labelled tiles of the test samples (score: probability of keep), its
    interval.
    """
    unit_N = np.repeat(resampling.unit_S, tiles.num_tiles_S)
    known = tiles.label_N != UNLABELLED
    if not known.any():
        return {"auc": None, "auc_interval": None, "num_tiles": 0}
    ranked = ranked_tiles(unit_N[known], tiles.label_N[known] == 1, 1 - tiles.p_compress_N[known])
    resampled = np.array([ranked.auc(counts_U) for counts_U in resampling.counts()])
    auc = ranked.auc(np.ones(resampling.num_units))
    return {"auc": _number(auc), "auc_interval": interval(resampled), "num_tiles": int(known.sum())}


def described(resampling: Resampling) -> dict:
    """What the intervals rest on."""
    return {
        "level": LEVEL,
        "resamples": resampling.num_resamples,
        "unit": resampling.unit,
        "num_units": resampling.num_units,
        "num_groups": resampling.num_groups,
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
