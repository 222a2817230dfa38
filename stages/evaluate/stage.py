"""The evaluate stage: answers of the test samples at many choices of tiles, against the tokens they save.

Every answer is generated once a sample and rate vector, however many points of the curves share it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from stages.context import Context
from stages.evaluate.config import BLOCK_SAMPLES, EvaluateConfig
from stages.inference import inference_settings
from stages.outputs import METRICS_FILE, PREDICTIONS_FILE, TABLE_FILE

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from stages.evaluate.actors import Block
    from stages.evaluate.points import EvaluatedTiles, Point


CODE_VERSION = 2
INPUTS = ("records", "heldout", "shard", "model", "consistency", "ratio", "router")
NEEDS_RAY = True
Config = EvaluateConfig


def run(config: EvaluateConfig, context: Context) -> dict[str, float | int | str]:
    """Publishes `parts/<block>.parquet`, `predictions.parquet`, `tiles.parquet`, `metrics.json`, `table.md`
    and figures.
    """
    from cluster.ray_session import ray_session
    from stages.evaluate.pictures import draw_evaluation
    from stages.evaluate.pixel_rule import measured_tiles, pixel_rule_choice, tile_labels
    from stages.evaluate.points import operating_points
    from stages.evaluate.table import evaluation_table
    from stages.evaluate.tiles import chosen_samples, ratio_by_content, sweep, tile_contents_of, tiles_of

    samples = chosen_samples(config, context)
    with open(context.inputs["router"] / METRICS_FILE, encoding="utf-8") as file:
        calibrated = json.load(file)["absolute_threshold"]
    with ray_session(context.site):
        measured = measured_tiles(config, context, samples)
        choice = pixel_rule_choice(measured, tile_labels(context))
        tiles = tiles_of(config, context, samples, measured, choice["feature"])
        points = operating_points(
            tiles,
            sweep(config, context, calibrated),
            calibrated,
            config.relative_threshold,
            config.controls,
            config.num_replicates,
            config.seed,
        )
        predictions = _predictions(config, context, blocks_of(samples["row"].to_pylist(), tiles, points))
    metrics = _metrics(config, context, samples, tiles, points, predictions)
    metrics |= {"absolute_threshold": calibrated, "pixel_rule_choice": choice}
    contents = tile_contents_of(samples, measured)
    metrics["ratio_by_content"] = ratio_by_content(tiles, contents)
    context.parts.write_json(METRICS_FILE, metrics)
    context.parts.partial(TABLE_FILE).write_text(evaluation_table(metrics), encoding="utf-8")
    context.parts.publish(TABLE_FILE, replace=True)
    draw_evaluation(context, samples, tiles, contents, predictions, metrics)
    context.log(headline(metrics), 0)
    return {"samples": len(samples), "tiles": len(tiles.p_compress_N), "answers": len(predictions)}


def _metrics(config: EvaluateConfig, context: Context, samples, tiles, points, predictions) -> dict:
    """The entries with their intervals, and what rests on several of them."""
    from stages.evaluate.intervals import add_intervals, comparisons, described, resampled_points, router_auc
    from stages.evaluate.resampling import resampling
    from stages.evaluate.scores import all_point_scores, evaluation_metrics
    from vico.settings import load_settings

    settings = load_settings(context.inputs["model"])
    saving = 1 - settings.tokens_compressed / settings.tokens_full
    scored = all_point_scores(samples, tiles, points, predictions)
    metrics = evaluation_metrics(samples, tiles, scored, settings)
    draws = resampling(samples["group"].to_pylist(), config.num_resamples, config.seed)
    resampled = resampled_points(scored, tiles.num_tiles_S, saving, draws)
    add_intervals(metrics, resampled)
    return {
        **metrics,
        **comparisons(resampled, saving),
        "router": router_auc(tiles, draws),
        "intervals": described(draws),
        "num_answers": len(predictions),
    }


def headline(metrics: dict) -> dict[str, float]:
    """The figures worth a line each: both ends, and the router at its calibrated threshold."""
    routed = [e for e in metrics["routed"] if e["threshold"] == metrics["absolute_threshold"]]
    entries = {
        "reference": metrics["reference"],
        "full": metrics["full"],
        "compressed": metrics["compressed"],
    }
    entries |= {"routed": routed[0], "served": metrics["served"][0]}
    names = ("tokens_saved", "exact_match", "similarity", "kl", "quality_kept", "truncated")
    found = {f"{entry}_{name}": values[name] for entry, values in entries.items() for name in names}
    found["router_auc"] = metrics["router"]["auc"]
    if metrics["gap_closed"]:
        found["gap_closed"] = metrics["gap_closed"]["at_point"]["share"]
        found["gap_closed_over_curve"] = metrics["gap_closed"]["over_curve"]["share"]
    return {name: value for name, value in found.items() if value is not None}


def blocks_of(rows: list[int], tiles: EvaluatedTiles, points: list[Point]) -> list[Block]:
    """The samples in blocks, each with the distinct rate vectors of all points, in a fixed order."""
    from stages.evaluate.actors import Block
    from stages.evaluate.scores import rate_text

    asked: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for point in points:
        for compressed in point.replicates:
            for known, flags in zip(asked, tiles.by_sample(compressed), strict=True):
                known.setdefault(rate_text(flags), flags)
    vectors = [tuple(flags for _, flags in sorted(known.items())) for known in asked]
    return [
        Block(
            number, tuple(rows[first : first + BLOCK_SAMPLES]), tuple(vectors[first : first + BLOCK_SAMPLES])
        )
        for number, first in enumerate(range(0, len(rows), BLOCK_SAMPLES))
    ]


def _predictions(config: EvaluateConfig, context: Context, blocks: list[Block]) -> pa.Table:
    """Every scored answer; blocks that an earlier attempt published are read, the others answered."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cluster.tasks import actor_pool
    from stages.evaluate.actors import Answerer, part_name

    parts = context.parts
    todo = [block for block in blocks if not parts.done(part_name(block.number))]
    total = sum(len(block.rows) for block in blocks)
    num_done = total - sum(len(block.rows) for block in todo)
    context.progress(num_done, total, "samples")
    if todo:
        actor = (inference_settings(context, config.dtype), config.max_new_tokens, parts)
        results = actor_pool(Answerer, actor, todo, "write_part", site=context.site, check=context.check)
        for _, num_samples in results:
            num_done += num_samples
            context.progress(num_done, total, "samples")
    predictions = pa.concat_tables(
        [pq.read_table(parts.output / part_name(block.number)) for block in blocks]
    )
    pq.write_table(predictions, parts.partial(PREDICTIONS_FILE))
    parts.publish(PREDICTIONS_FILE, replace=True)
    return predictions
