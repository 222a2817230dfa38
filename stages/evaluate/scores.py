"""From scored answers to the entries of evaluate's metrics.json: means over samples, exact token counts, by
kind too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stages.evaluate.points import EvaluatedTiles, Point
from vico.settings import ModelSettings

LISTED = ("routed", "served", "random", "shuffled", "pixel_rule", "oracle")
"""Entries that are lists in metrics.json; the others stand alone."""


@dataclass(frozen=True)
class Score:
    """One answer of one sample: similarity 0..1 (ANLS), `kl` in nats per answer token."""

    exact_match: bool
    similarity: float
    kl: float
    truncated: bool


SCORED = ("exact_match", "similarity", "kl", "truncated")


@dataclass(frozen=True, eq=False)
class PointScores:
    """A point's scores, each float64 [R, S], and its number of compressed tiles, int64 [R, S]."""

    point: Point
    scores: Mapping[str, np.ndarray]
    num_compressed: np.ndarray


def rate_text(compressed: np.ndarray) -> str:
    """A rate vector as text, a character a tile in prompt order: 1 compressed, 0 full."""
    return "".join("1" if flag else "0" for flag in compressed)


def point_scores(point: Point, tiles: EvaluatedTiles, found: Sequence[Mapping[str, Score]]) -> PointScores:
    """Looks up each sample's score at the point's rates; `found[s]` maps a rate text to a score."""
    by_replicate = [tiles.by_sample(compressed) for compressed in point.replicates]
    scores = [[found[s][rate_text(flags)] for s, flags in enumerate(by_sample)] for by_sample in by_replicate]
    columns = {
        name: np.array([[getattr(score, name) for score in row] for row in scores], np.float64)
        for name in SCORED
    }
    counts = np.array([[int(flags.sum()) for flags in by_sample] for by_sample in by_replicate], np.int64)
    return PointScores(point, columns, counts)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some of the test samples with what their entries are measured against."""

    mask_S: np.ndarray
    num_tiles: int
    tokens_full: int
    tokens_compressed: int
    reference_similarity: float


def entry(found: PointScores, subset: Subset) -> dict[str, float | int | None]:
    """One entry: means over samples and replicates, `similarity_sd` over replicates where there are several.

    `visual_tokens` counts all of the subset's samples. A share of nothing (no tiles) is 0; `quality_kept` is
    null where the reference has no similarity to keep.
    """
    means = {name: values[:, subset.mask_S].mean(axis=1) for name, values in found.scores.items()}
    compressed = float(found.num_compressed[:, subset.mask_S].sum(axis=1).mean())
    all_tokens = subset.num_tiles * subset.tokens_full
    tokens = all_tokens - compressed * (subset.tokens_full - subset.tokens_compressed)
    similarity = float(means["similarity"].mean())
    result: dict[str, float | int | None] = {}
    if found.point.threshold is not None:
        result["threshold"] = found.point.threshold
    result |= {
        "share_compressed": compressed / subset.num_tiles if subset.num_tiles else 0.0,
        "visual_tokens": int(tokens) if tokens == int(tokens) else tokens,
        "tokens_saved": 1 - tokens / all_tokens if all_tokens else 0.0,
        "exact_match": float(means["exact_match"].mean()),
        "similarity": similarity,
        "kl": float(means["kl"].mean()),
        "quality_kept": similarity / subset.reference_similarity if subset.reference_similarity else None,
        "truncated": float(means["truncated"].mean()),
    }
    if len(found.point.replicates) > 1:
        result["similarity_sd"] = float(means["similarity"].std(ddof=1))
    return result


def entries(scored: Sequence[PointScores], subset: Subset) -> dict:
    """All entries over a subset, in the form of metrics.json."""
    result: dict = {name: [] for name in LISTED}
    for found in scored:
        name = found.point.entry
        if name in LISTED:
            result[name].append(entry(found, subset))
        else:
            result[name] = entry(found, subset)
    return result


def all_point_scores(
    samples: pa.Table, tiles: EvaluatedTiles, points: Sequence[Point], predictions: pa.Table
) -> list[PointScores]:
    """The scores of the reference, then of each point."""
    found = scores_by_sample(samples["key"].to_pylist(), predictions)
    none = np.zeros(len(tiles.p_compress_N), bool)
    scored = [point_scores(Point("reference", (none,)), tiles, [one["reference"] for one in found])]
    return scored + [point_scores(point, tiles, [one["policy"] for one in found]) for point in points]


def evaluation_metrics(
    samples: pa.Table, tiles: EvaluatedTiles, scored: Sequence[PointScores], settings: ModelSettings
) -> dict:
    """metrics.json of the stage: all entries over all samples, and under `by_kind` the same by kind of
    content.
    """
    kinds = np.asarray(samples["kind"].to_pylist())
    counts_S = tiles.num_tiles_S

    def subset(mask_S: np.ndarray) -> Subset:
        similarity = float(scored[0].scores["similarity"][0, mask_S].mean())
        sizes = settings.tokens_full, settings.tokens_compressed
        return Subset(mask_S, int(counts_S[mask_S].sum()), *sizes, similarity)

    def summary(mask_S: np.ndarray) -> dict:
        return {"num_samples": int(mask_S.sum()), **entries(scored, subset(mask_S))}

    return {
        **summary(np.ones(len(samples), bool)),
        "num_tiles": len(tiles.p_compress_N),
        "tokens_a_tile": {"full": settings.tokens_full, "compressed": settings.tokens_compressed},
        "ratios_known": tiles.ratio_N is not None,
        "by_kind": {str(kind): summary(kinds == kind) for kind in np.unique(kinds)},
    }


def scores_by_sample(keys: Sequence[str], predictions: pa.Table) -> list[dict[str, dict[str, Score]]]:
    """For each sample the score of each answer, by model (`reference`, `policy`) and rate text."""
    by_key: dict[str, dict[str, dict[str, Score]]] = {key: {"reference": {}, "policy": {}} for key in keys}
    names = ("key", "model", "rates", *SCORED)
    for key, model, rates, *values in zip(*(predictions[name].to_pylist() for name in names), strict=True):
        by_key[key][model][rates] = Score(*values)
    return [by_key[key] for key in keys]
