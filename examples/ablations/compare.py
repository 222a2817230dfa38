"""Compare the evaluations of several runs question by question, with paired intervals.

Shapes: S test samples, N tiles, B the test samples and their resamples, T positions on the axis of tokens
saved.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.shards.index import load_index
from pipeline.config.graph import last_of
from pipeline.results.run_results import RunRecord, record_of
from pipeline.results.runs import RunFile, Runs
from stages.controls import COMPRESSED, FULL, ROUTED, calibrated_points
from stages.evaluate.intervals import ResampledPoints, resampled_points
from stages.evaluate.points import EvaluatedTiles, Point, routed_points
from stages.evaluate.resampling import Resampling, interval, resampling, units_of
from stages.evaluate.scores import all_point_scores
from stages.evaluate.tiles import column_by_tile, sample_tile_keys
from stages.outputs import METRICS_FILE, PREDICTIONS_FILE, SCORES_FILE
from vico.errors import UserError

HALF = 0.5
"""Share of the visual tokens saved at which runs are compared, beside the whole curve."""
_POSITIONS = 61
_COLUMNS = ("key", "group", "tiles", "image_sha256")
Interval = list[float] | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One finished run: its evaluation, test samples and tiles with the router's scores."""

    run: str
    metrics: Mapping[str, Any]
    samples: pa.Table
    points: ResampledPoints
    seconds: float
    """Time of all its stages."""
    own_seconds: float
    """Time of the stages that it does not share with the base."""
    saving_per_tile: float


@dataclass(frozen=True)
class Row:
    """One row of the table: an ablation against the base. Differences are the ablation minus the base."""

    name: str
    run: str
    auc: float | None
    tokens_saved: float
    """At the calibrated threshold, like `kept`."""
    kept: float | None
    kept_interval: Interval
    kept_at_half: float | None
    kept_at_half_interval: Interval
    minus_base_at_half: float | None
    minus_base_at_half_interval: Interval
    minus_base_over_curve: float | None
    minus_base_over_curve_interval: Interval
    seconds: float
    own_seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluation_of(run_name: str, storage: Path, base: RunFile | None = None) -> Evaluation:
    """Read a finished run. Raises UserError if a result is gone."""
    run = Runs(storage).named(run_name)
    records = {stage: _result(run, stage, storage) for stage in run.stages}
    metrics = json.loads((records["evaluate"].output / METRICS_FILE).read_text(encoding="utf-8"))
    predictions = pq.read_table(records["evaluate"].output / PREDICTIONS_FILE)
    samples = load_index(records["shard"].output).table(_COLUMNS, "test")
    samples = samples.filter(pc.is_in(samples["key"], pc.unique(predictions["key"])))
    tiles = _tiles(samples, [records[last_of(records, "router")].output, records["evaluate"].output])
    sizes = metrics["tokens_a_tile"]
    saving = 1 - sizes["compressed"] / sizes["full"]
    num_tiles = len(tiles.p_compress_N)
    points = [
        Point(FULL, (np.zeros(num_tiles, bool),)),
        Point(COMPRESSED, (np.ones(num_tiles, bool),)),
        *routed_points(tiles, [point["threshold"] for point in metrics[ROUTED.name]]),
    ]
    scored = all_point_scores(samples, tiles, points, predictions)
    shared = set() if base is None else {entry.fingerprint for entry in base.stages.values()}
    seconds = {stage: result.record.seconds for stage, result in records.items()}
    own = [seconds[stage] for stage, entry in run.stages.items() if entry.fingerprint not in shared]
    draws = _draws(samples, run)
    return Evaluation(
        run=run.run,
        metrics=metrics,
        samples=samples,
        points=resampled_points(scored, tiles.num_tiles_S, saving, draws),
        seconds=sum(seconds.values()),
        own_seconds=sum(own),
        saving_per_tile=saving,
    )


def _draws(samples: pa.Table, run: RunFile) -> Resampling:
    config = run.config["evaluate"]
    return resampling(*units_of(samples), config["num_resamples"], config["seed"])


def _result(run: RunFile, stage: str, storage: Path) -> RunRecord:
    result = record_of(run, stage, storage)
    if result is None or not result.output.is_dir():
        raise UserError(f"run {run.run} has no result of {stage} in {storage}; run it again")
    return result


def _tiles(samples: pa.Table, folders: Sequence[Path]) -> EvaluatedTiles:
    """Return the samples' tiles with the router's scores, from the stages that scored them."""
    scores: dict[Any, float] = {}
    for folder in folders:
        if (folder / SCORES_FILE).is_file():
            scores |= column_by_tile(pq.read_table(folder / SCORES_FILE), "p_compress")
    keys = sample_tile_keys(samples)
    p_compress_N = np.array([scores[key] for key in keys], np.float32)
    return EvaluatedTiles([tuple(tiles) for tiles in samples["tiles"].to_pylist()], p_compress_N, None)


def compared(name: str, evaluation: Evaluation, base: Evaluation) -> Row:
    """Return the row of a run against the base.

    Both are resampled by the same draws of the same test questions. Raises UserError if the questions
    differ.
    """
    if not evaluation.samples.equals(base.samples) or len(evaluation.points.saved_BP) != len(
        base.points.saved_BP
    ):
        raise UserError(
            f"{name}: run {evaluation.run} has other test questions or resamples than run {base.run}; leave "
            "inputs, shard and evaluate as they are in the base"
        )
    half, half_base = _at_half(evaluation), _at_half(base)
    curve, curve_base = _over_curve(evaluation), _over_curve(base)
    (calibrated,) = calibrated_points(evaluation.metrics)[:1]
    return Row(
        name=name,
        run=evaluation.run,
        auc=evaluation.metrics["router"]["auc"],
        tokens_saved=calibrated["tokens_saved"],
        kept=calibrated["quality_kept"],
        kept_interval=calibrated.get("quality_kept_interval"),
        kept_at_half=_number(half[0]),
        kept_at_half_interval=interval(half[1:]),
        minus_base_at_half=_number(half[0] - half_base[0]),
        minus_base_at_half_interval=interval(half[1:] - half_base[1:]),
        minus_base_over_curve=_number(curve[0] - curve_base[0]),
        minus_base_over_curve_interval=interval(curve[1:] - curve_base[1:]),
        seconds=evaluation.seconds,
        own_seconds=evaluation.own_seconds,
    )


def _at_half(evaluation: Evaluation) -> np.ndarray:
    """Return the router's quality kept with half of the tokens saved, float64 [B]."""
    saved_B1 = np.full((len(evaluation.points.saved_BP), 1), HALF)
    return evaluation.points.curve_at(ROUTED, saved_B1)[:, 0]


def _over_curve(evaluation: Evaluation) -> np.ndarray:
    """Return the router's quality kept, averaged over all tokens that can be saved, float64 [B]."""
    saved_T = np.linspace(0, evaluation.saving_per_tile, _POSITIONS)
    saved_BT = np.tile(saved_T, (len(evaluation.points.saved_BP), 1))
    return evaluation.points.curve_at(ROUTED, saved_BT).mean(axis=1)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
