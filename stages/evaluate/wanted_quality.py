"""The threshold that keeps a wanted quality on calibration samples and saves the most tokens there."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import pyarrow as pa

from stages.context import Context
from stages.controls import COMPRESSED, FULL, ROUTED
from stages.evaluate.blocks import Block, blocks_of
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.intervals import resampled_points
from stages.evaluate.points import EvaluatedTiles, Point, routed_points
from stages.evaluate.resampling import interval, resampling, units_of
from stages.evaluate.scores import all_point_scores
from stages.evaluate.tiles import chosen_samples, router_scores, sample_tile_keys
from vico.errors import UserError
from vico.settings import load_settings


class QualityChoice(TypedDict):
    """The chosen threshold, and what it keeps and saves on the calibration samples.

    If no threshold keeps the wanted quality, `reached` is false and the threshold compresses the fewest tiles
    of those measured.
    """

    wanted: float
    reached: bool
    threshold: float
    quality_kept: float
    quality_kept_interval: list[float] | None
    tokens_saved: float
    num_samples: int


Answers = Callable[[Sequence[Block]], pa.Table]
"""Returns the scored answers to blocks."""


def threshold_for_quality(
    config: EvaluateConfig,
    context: Context,
    thresholds: Sequence[float],
    answers: Answers,
) -> QualityChoice:
    """Answer the calibration samples at each threshold, and choose one for `config.wanted_quality`.

    Needs Ray if the router stage did not score all of their tiles. Raises UserError if the reference answers
    none of them at all.
    """
    assert config.wanted_quality is not None
    samples = chosen_samples(config, context, "calib")
    scores = router_scores(config, context, samples, "calib")
    p_compress = [scores[key] for key in sample_tile_keys(samples)]
    tiles = EvaluatedTiles(
        [tuple(counts) for counts in samples["tiles"].to_pylist()], np.array(p_compress, np.float32), None
    )
    num_tiles = len(p_compress)
    points = [
        Point(FULL, (np.zeros(num_tiles, bool),)),
        Point(COMPRESSED, (np.ones(num_tiles, bool),)),
        *routed_points(tiles, thresholds),
    ]
    predictions = answers(blocks_of(samples["row"].to_pylist(), tiles, points))
    scored = all_point_scores(samples, tiles, points, predictions)
    settings = load_settings(context.folder("model"))
    saving_per_tile = 1 - settings.tokens_compressed / settings.tokens_full
    draws = resampling(*units_of(samples), config.num_resamples, config.seed)
    resampled = resampled_points(scored, tiles.num_tiles_S, saving_per_tile, draws)
    columns = resampled.columns(ROUTED)
    quality_P, saved_P = resampled.quality_BP[0, columns], resampled.saved_BP[0, columns]
    if np.isnan(quality_P).any():
        raise UserError(
            "evaluate.wanted_quality: the reference answers no calibration sample, so no quality is defined; "
            "leave it out, or give other records"
        )
    enough = np.flatnonzero(quality_P >= config.wanted_quality)
    best = int(enough[np.argmax(saved_P[enough])] if len(enough) else np.argmin(saved_P))
    return {
        "wanted": config.wanted_quality,
        "reached": bool(len(enough)),
        "threshold": thresholds[best],
        "quality_kept": float(quality_P[best]),
        "quality_kept_interval": interval(resampled.quality_BP[1:, columns[best]]),
        "tokens_saved": float(saved_P[best]),
        "num_samples": len(samples),
    }


def choice_line(choice: QualityChoice) -> str:
    """Return the choice as a line for people."""
    samples, value = f"{choice['num_samples']:,} calibration samples", f"{choice['threshold']:.6g}"
    kept = f"keeps {choice['quality_kept']:.3f} of the quality on {samples}"
    if choice["reached"]:
        return (
            f"threshold {value} for evaluate.wanted_quality={choice['wanted']:g}: it {kept} and saves "
            f"{choice['tokens_saved']:.1%} of the tokens there"
        )
    return (
        f"no measured threshold keeps evaluate.wanted_quality={choice['wanted']:g}; the one that compresses "
        f"the fewest tiles, {value}, is used and {kept}: add smaller evaluate.shares, or train longer"
    )
