"""The evaluate stage: answer the test samples with many choices of compressed tiles, against the tokens
saved.

Every answer is generated once per sample and rate vector, however many points share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.context import Context
from stages.controls import (
    COMPRESSED,
    FULL,
    REFERENCE,
    ROUTED,
    SERVED,
    calibrated_points,
    point_of,
    points_of,
)
from stages.evaluate.config import EvaluateConfig
from stages.inference import inference_settings
from stages.outputs import METRICS_FILE, POLICY_FOLDER, PREDICTIONS_FILE, TABLE_FILE, block_part

if TYPE_CHECKING:
    import pyarrow as pa

    from stages.evaluate.blocks import Block
    from stages.evaluate.points import EvaluatedTiles
    from stages.evaluate.scores import PointScores


CODE_VERSION = 7
INPUTS = ("records", "heldout", "shard", "model", "consistency", "label", "router")
NEEDS_RAY = True
Config = EvaluateConfig


def run(config: EvaluateConfig, context: Context) -> dict[str, float | int | str]:
    """Publish answers by block and as a table, measured tiles, `metrics.json`, `table.md` and plots."""
    from cluster.ray_session import ray_session
    from stages.evaluate.blocks import blocks_of
    from stages.evaluate.pictures import publish_plots
    from stages.evaluate.points import operating_points
    from stages.evaluate.scores import all_point_scores
    from stages.evaluate.table import evaluation_table
    from stages.evaluate.tile_measures.pixel_rule import fitted_pixel_rule, measured_tiles, tile_labels
    from stages.evaluate.tiles import chosen_samples, evaluated_tiles, ratio_by_content, swept_thresholds
    from stages.evaluate.wanted_quality import choice_line, threshold_for_quality
    from stages.router_files import calibrated_threshold, check_router_policy

    samples = chosen_samples(config, context)
    calibrated = calibrated_threshold(context.folder("router"))
    check_router_policy(context.folder("router"), context.folder("consistency") / POLICY_FOLDER)
    thresholds = swept_thresholds(config, context, calibrated)
    quality_choice = None
    with ray_session(context.site):
        if config.wanted_quality is not None:
            quality_choice = threshold_for_quality(
                config, context, thresholds, lambda blocks: _predictions(config, context, blocks, "calib")
            )
            context.note(choice_line(quality_choice))
            calibrated = quality_choice["threshold"]
        measured = measured_tiles(config, context, samples)
        pixel_fit, pixel_scores = fitted_pixel_rule(measured, tile_labels(context))
        tiles = evaluated_tiles(config, context, samples, measured, pixel_scores)
        points = operating_points(tiles, config, thresholds, calibrated)
        predictions = _predictions(config, context, blocks_of(samples["row"].to_pylist(), tiles, points))
    scored = all_point_scores(samples, tiles, points, predictions)
    metrics = {
        **_metrics(config, context, samples, tiles, scored),
        "num_answers": len(predictions),
        "absolute_threshold": calibrated,
        "wanted_quality": quality_choice,
        "pixel_rule_fit": pixel_fit,
        "ratio_by_content": ratio_by_content(tiles),
    }
    context.parts.write_json(METRICS_FILE, metrics)
    context.parts.partial(TABLE_FILE).write_text(evaluation_table(metrics), encoding="utf-8")
    context.parts.publish(TABLE_FILE, replace=True)
    publish_plots(context, samples, tiles, predictions, metrics)
    context.log(headline_metrics(metrics), 0)
    return {"samples": len(samples), "tiles": len(tiles.p_compress_N), "answers": len(predictions)}


def _metrics(
    config: EvaluateConfig,
    context: Context,
    samples: pa.Table,
    tiles: EvaluatedTiles,
    scored: Sequence[PointScores],
) -> dict[str, Any]:
    """Return all points with their intervals, and the comparisons between them."""
    from stages.evaluate.intervals import (
        add_intervals,
        comparisons,
        interval_basis,
        resampled_points,
        router_auc,
    )
    from stages.evaluate.resampling import resampling, units_of
    from stages.evaluate.scores import evaluation_metrics
    from vico.settings import load_settings

    settings = load_settings(context.folder("model"))
    saving_per_tile = 1 - settings.tokens_compressed / settings.tokens_full
    metrics = evaluation_metrics(samples, tiles, scored, settings)
    draws = resampling(*units_of(samples), config.num_resamples, config.seed)
    resampled = resampled_points(scored, tiles.num_tiles_S, saving_per_tile, draws)
    add_intervals(metrics, resampled)
    return {
        **metrics,
        **comparisons(resampled, saving_per_tile),
        "router": router_auc(tiles, draws),
        "intervals": interval_basis(draws),
    }


def headline_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are logged: reference, both ends, router and served rule."""
    points = {control.name: point_of(metrics, control) for control in (REFERENCE, FULL, COMPRESSED)}
    points |= {ROUTED.name: calibrated_points(metrics)[0], SERVED.name: points_of(metrics, SERVED)[0]}
    headline: dict[str, float | None] = {}
    for name, point in points.items():
        headline |= {
            f"{name}_tokens_saved": point["tokens_saved"],
            f"{name}_exact_match": point["exact_match"],
            f"{name}_similarity": point["similarity"],
            f"{name}_kl": point["kl"],
            f"{name}_quality_kept": point["quality_kept"],
            f"{name}_truncated": point["truncated"],
        }
    headline["router_auc"] = metrics["router"]["auc"]
    if metrics["gap_closed"]:
        headline["gap_closed"] = metrics["gap_closed"]["at_point"]["share"]
        headline["gap_closed_over_curve"] = metrics["gap_closed"]["over_curve"]["share"]
    return {name: value for name, value in headline.items() if value is not None}


def _predictions(
    config: EvaluateConfig, context: Context, blocks: Sequence[Block], split: str = "test"
) -> pa.Table:
    """Return every scored answer; blocks that an earlier attempt published are read, the others answered.

    Those of test are published as one table, too.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cluster.tasks import actor_pool
    from stages.evaluate.actors import Answerer

    parts = context.parts
    open_blocks = [block for block in blocks if not parts.done(block_part(split, block.number))]
    total = sum(len(block.rows) for block in blocks)
    num_done = total - sum(len(block.rows) for block in open_blocks)
    context.progress(num_done, total, f"{split} samples")
    if open_blocks:
        arguments = (inference_settings(context, config.dtype), config.max_new_tokens, parts, split)
        results = actor_pool(
            Answerer, arguments, open_blocks, "write_part", site=context.site, check=context.check
        )
        for _, num_samples in results:
            num_done += num_samples
            context.progress(num_done, total, f"{split} samples")
    predictions = pa.concat_tables(
        [pq.read_table(parts.output / block_part(split, block.number)) for block in blocks]
    )
    if split == "test":
        pq.write_table(predictions, parts.partial(PREDICTIONS_FILE))
        parts.publish(PREDICTIONS_FILE, replace=True)
    return predictions
