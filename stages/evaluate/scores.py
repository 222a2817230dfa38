"""From scored answers to the points of metrics.json: means over samples and exact token counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stages.controls import LISTED, REFERENCE, PointMetrics
from stages.evaluate.points import EvaluatedTiles, Point
from vico.settings import ModelSettings

# S samples, R replicates, N tiles


@dataclass(frozen=True)
class Score:
    """One answer to one sample: similarity 0..1 (ANLS), `kl` in nats per answer token."""

    exact_match: bool
    similarity: float
    kl: float
    truncated: bool


SCORE_COLUMNS = ("exact_match", "similarity", "kl", "truncated")


@dataclass(frozen=True, eq=False)
class PointScores:
    """The scores of a point, float64 [R, S] each, its number of compressed tiles, int64 [R, S], and how many
    tiles it has less than the samples, int64 [S]."""

    point: Point
    scores: Mapping[str, np.ndarray]
    num_compressed: np.ndarray
    num_dropped_S: np.ndarray


def rate_text(compressed: np.ndarray) -> str:
    """Return a rate vector as text, one character per tile in prompt order: 1 compressed, 0 full."""
    return "".join("1" if flag else "0" for flag in compressed)


def point_scores(
    point: Point, tiles: EvaluatedTiles, scores_by_rates: Sequence[Mapping[str, Score]]
) -> PointScores:
    """Look up each sample's score at the point's rates; `scores_by_rates[s]` maps a rate text to a score."""
    by_replicate = [point.by_sample(tiles, compressed) for compressed in point.replicates]
    scores = [
        [scores_by_rates[s][rate_text(flags)] for s, flags in enumerate(by_sample)]
        for by_sample in by_replicate
    ]
    columns = {
        name: np.array([[getattr(score, name) for score in row] for row in scores], np.float64)
        for name in SCORE_COLUMNS
    }
    counts = np.array([[int(flags.sum()) for flags in by_sample] for by_sample in by_replicate], np.int64)
    dropped_S = tiles.num_tiles_S - np.array([len(flags) for flags in by_replicate[0]], np.int64)
    return PointScores(point, columns, counts, dropped_S)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some of the test samples (`mask_S` bool) with the totals that their points are divided by."""

    mask_S: np.ndarray
    num_tiles: int
    tokens_full: int
    tokens_compressed: int
    reference_similarity: float


def point_metrics(scored: PointScores, subset: Subset) -> PointMetrics:
    """Return a point's means over samples and replicates, with `similarity_sd` if it has several replicates.

    `visual_tokens` is the total over the subset's samples. Without tiles, shares are 0. `quality_kept` is
    null if the reference's similarity is 0, `kl` if the point has other tiles than the reference.
    """
    means = {name: values_RS[:, subset.mask_S].mean(axis=1) for name, values_RS in scored.scores.items()}
    compressed = float(scored.num_compressed[:, subset.mask_S].sum(axis=1).mean())
    all_tokens = subset.num_tiles * subset.tokens_full
    tokens = all_tokens - compressed * (subset.tokens_full - subset.tokens_compressed)
    tokens -= int(scored.num_dropped_S[subset.mask_S].sum()) * subset.tokens_full
    similarity = float(means["similarity"].mean())
    metrics: PointMetrics = {
        "share_compressed": compressed / subset.num_tiles if subset.num_tiles else 0.0,
        "visual_tokens": int(tokens) if tokens == int(tokens) else tokens,
        "tokens_saved": 1 - tokens / all_tokens if all_tokens else 0.0,
        "exact_match": float(means["exact_match"].mean()),
        "similarity": similarity,
        "kl": None if np.isnan(means["kl"]).any() else float(means["kl"].mean()),
        "quality_kept": similarity / subset.reference_similarity if subset.reference_similarity else None,
        "truncated": float(means["truncated"].mean()),
    }
    if len(scored.point.replicates) > 1:
        metrics["similarity_sd"] = float(means["similarity"].std(ddof=1))
    if scored.point.max_tiles is not None:
        return {"max_tiles": scored.point.max_tiles, **metrics}
    if scored.point.threshold is not None:
        return {"threshold": scored.point.threshold, **metrics}
    return metrics


def metrics_by_control(scored: Sequence[PointScores], subset: Subset) -> dict[str, Any]:
    """Return the points over a subset by the control's name, in the form of metrics.json."""
    by_name: dict[str, Any] = {control.name: [] for control in LISTED}
    for scores in scored:
        control, metrics = scores.point.control, point_metrics(scores, subset)
        if control.is_listed:
            by_name[control.name].append(metrics)
        else:
            by_name[control.name] = metrics
    return by_name


def all_point_scores(
    samples: pa.Table, tiles: EvaluatedTiles, points: Sequence[Point], predictions: pa.Table
) -> list[PointScores]:
    """Return the scores of the reference, then those of each point."""
    scores = scores_by_sample(samples["key"].to_pylist(), predictions)
    reference = Point(REFERENCE, (np.zeros(len(tiles.p_compress_N), bool),))
    of_reference = point_scores(reference, tiles, [by_model["reference"] for by_model in scores])
    of_policy = [by_model["policy"] for by_model in scores]
    return [of_reference, *(point_scores(point, tiles, of_policy) for point in points)]


def evaluation_metrics(
    samples: pa.Table, tiles: EvaluatedTiles, scored: Sequence[PointScores], settings: ModelSettings
) -> dict[str, Any]:
    """Return the points over all samples, and under `by_kind` the same for each kind of content."""
    kinds = np.asarray(samples["kind"].to_pylist())
    counts_S = tiles.num_tiles_S

    def subset(mask_S: np.ndarray) -> Subset:
        similarity = float(scored[0].scores["similarity"][0, mask_S].mean())
        sizes = settings.tokens_full, settings.tokens_compressed
        return Subset(mask_S, int(counts_S[mask_S].sum()), *sizes, similarity)

    def summary(mask_S: np.ndarray) -> dict[str, Any]:
        return {"num_samples": int(mask_S.sum()), **metrics_by_control(scored, subset(mask_S))}

    return {
        **summary(np.ones(len(samples), bool)),
        "num_tiles": len(tiles.p_compress_N),
        "tokens_a_tile": {"full": settings.tokens_full, "compressed": settings.tokens_compressed},
        "ratios_known": tiles.ratio_N is not None,
        "by_kind": {str(kind): summary(kinds == kind) for kind in np.unique(kinds)},
    }


def scores_by_sample(keys: Sequence[str], predictions: pa.Table) -> list[dict[str, dict[str, Score]]]:
    """Return each sample's score of each answer, by model (`reference`, `policy`) and rate text."""
    by_key: dict[str, dict[str, dict[str, Score]]] = {key: {"reference": {}, "policy": {}} for key in keys}
    names = ("key", "model", "rates", *SCORE_COLUMNS)
    for key, model, rates, *values in zip(*(predictions[name].to_pylist() for name in names), strict=True):
        by_key[key][model][rates] = Score(*values)
    return [by_key[key] for key in keys]
