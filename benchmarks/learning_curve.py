"""The learning curve of the router: test AUC against the number of labelled train tiles, from a finished run.

    python -m benchmarks.learning_curve RUN --storage FOLDER --out FOLDER --json

Trains the router of the run's config on nested subsets of the train samples with labels, several times with
different seeds, on the run's shards, policy and labels. Each training has one candidate, so that the spread
over seeds is that of a router that was not chosen among others. Labels of test tiles, and so tau, stay those
of all tiles; `--test-tiles` scores the first samples, in a fixed order, that have so many.
`gap_closed` is (random - router) / (random - oracle), where each compresses `--share` of the test tiles and
is measured by the summed increase of their losses; the oracle takes the tiles with the smallest. Writes
`learning_curve.md` and `learning_curve.png` to `--out`.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cluster.ray_session import ray_session
from data_prep.draws import draw_order
from pipeline.results.run_results import record_of
from pipeline.results.runs import Runs
from stages.outputs import LABELS_FILE, METRICS_FILE, RATIOS_FILE, SCORES_FILE
from stages.router import stage as router
from stages.router.config import RouterConfig
from tests.stage_context import stage_context

TILE = ["key", "image", "tile"]
METRICS = ("auc", "gap_closed")


def outputs_of(storage: Path, run_name: str) -> tuple[dict[str, Path], RouterConfig]:
    """Return the output folders of the run's stages, and its router config."""
    run = Runs(storage).named(run_name)
    outputs = {}
    for stage in ("shard", "consistency", "ratio", "label"):
        record = record_of(run, stage, storage)
        if record is None:
            raise SystemExit(f"{run.run}: stage {stage} is not done; give a run whose labels are finished")
        outputs[stage] = record.output
    return outputs, RouterConfig(**run.config["router"])


def labels_of_some(labels: pa.Table, split: str, num_tiles: int) -> pa.Table:
    """Return the labels of the other splits, and of as many samples of `split` as have `num_tiles` tiles.

    Samples come in a fixed order, so a smaller choice is part of a larger one.
    """
    is_chosen_from = pc.equal(labels["split"], split)
    some, others = labels.filter(is_chosen_from), labels.filter(pc.invert(is_chosen_from))
    counts = pc.value_counts(some["key"])
    keys, sizes = counts.field("values"), counts.field("counts").to_numpy()
    order = draw_order("learning curve", 0, np.arange(len(keys)))
    num_samples = int(np.searchsorted(np.cumsum(sizes[order]), num_tiles)) + 1
    chosen = keys.take(pa.array(order[:num_samples]))
    return pa.concat_tables([some.filter(pc.is_in(some["key"], chosen)), others])


def gap_closed(scores: pa.Table, ratios: pa.Table, share: float) -> float:
    """Return how much of the way from random to oracle the scores go on test tiles."""
    test = scores.filter(pc.equal(scores["split"], "test")).select([*TILE, "p_compress"])
    types = pa.schema([("key", pa.string()), ("image", pa.int32()), ("tile", pa.int32())])
    for number, field in enumerate(types):
        test = test.set_column(number, field, test[field.name].cast(field.type))
    joined = test.join(ratios, TILE, join_type="inner")
    increase = joined["loss_compressed"].to_numpy() - joined["loss_full"].to_numpy()
    num_compressed = round(share * len(joined))
    routed = increase[np.argsort(-joined["p_compress"].to_numpy(), kind="stable")[:num_compressed]].sum()
    random, oracle = share * increase.sum(), np.sort(increase)[:num_compressed].sum()
    return float((random - routed) / (random - oracle))


def trained(outputs: dict[str, Path], labels: pa.Table, config: RouterConfig, share: float) -> dict[str, Any]:
    """Train a router on these labels; return AUC and gap closed on test tiles, and the number of tiles."""
    folder = Path(tempfile.mkdtemp(prefix="learning-curve-"))
    try:
        label_folder = folder / "labels"
        label_folder.mkdir()
        pq.write_table(labels, label_folder / LABELS_FILE)
        context = stage_context("router", folder, {**outputs, "label": label_folder})
        with ray_session(context.site):
            router.run(config, context)
        metrics = json.loads((context.parts.output / METRICS_FILE).read_text())
        scores = pq.read_table(context.parts.output / SCORES_FILE)
    finally:
        shutil.rmtree(folder)
    ratios = pq.read_table(outputs["ratio"] / RATIOS_FILE)
    return {
        "train_tiles": metrics["num_train"],
        "auc": metrics["auc"],
        "gap_closed": gap_closed(scores, ratios.select([*TILE, "loss_full", "loss_compressed"]), share),
    }


def point_of(results: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the mean over seeds of each metric, with the smallest and largest value."""
    point = {"train_tiles": results[0]["train_tiles"], "seeds": len(results), "seconds": round(seconds, 1)}
    for name in METRICS:
        values = [result[name] for result in results]
        point |= {name: statistics.mean(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    return point


def table_of(points: Sequence[dict[str, Any]], share: float) -> str:
    """Return the points as Markdown."""
    lines = [
        f"| labelled train tiles | test AUC (smallest to largest) | gap closed at {share:.0%} compressed |",
        "|---|---|---|",
    ]
    for point in points:
        cells = [f"{point[n]:.3f} ({point[f'{n}_min']:.3f} to {point[f'{n}_max']:.3f})" for n in METRICS]
        lines.append(f"| {point['train_tiles']:,} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def figure_of(points: Sequence[dict[str, Any]]) -> Figure:
    """Return AUC and gap closed against the number of tiles; bars reach from the smallest to the largest."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    tiles = [point["train_tiles"] for point in points]
    for axes, name, title in zip(
        figure.subplots(1, 2), METRICS, ("test AUC", "gap random to oracle closed"), strict=True
    ):
        means = np.array([point[name] for point in points])
        ends = np.array(
            [[point[f"{name}_min"] for point in points], [point[f"{name}_max"] for point in points]]
        )
        axes.errorbar(tiles, means, np.abs(ends - means), marker="o", capsize=3)
        axes.set_xscale("log")
        axes.set_xticks(tiles, [f"{count:,}" for count in tiles])
        axes.minorticks_off()
        axes.set_xlabel("labelled train tiles")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="latest", help="id of a run, or latest")
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--shares", default="0.125,0.25,0.5,1", help="shares of the labelled train tiles")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=2 / 3, help="share of test tiles to compress")
    parser.add_argument("--test-tiles", type=int, default=0, help="test tiles to score; 0: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    outputs, config = outputs_of(options.storage, options.run)
    config = config.model_copy(update={"candidates": 1})
    labels = pq.read_table(outputs["label"] / LABELS_FILE)
    if options.test_tiles:
        labels = labels_of_some(labels, "test", options.test_tiles)
    num_train = pc.sum(pc.equal(labels["split"], "train")).as_py()
    points = []
    for share in map(float, options.shares.split(",")):
        some, started = labels_of_some(labels, "train", round(share * num_train)), time.perf_counter()
        results = [
            trained(outputs, some, config.model_copy(update={"seed": config.seed + n}), options.share)
            for n in range(options.seeds)
        ]
        points.append(point_of(results, (time.perf_counter() - started) / options.seeds))
        print(points[-1], file=sys.stderr, flush=True)
    table = table_of(points, options.share)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "learning_curve.md").write_text(table)
    figure_of(points).savefig(options.out / "learning_curve.png", dpi=120)
    print(table)
    if options.json:
        print(json.dumps({"name": "learning_curve", "rows": points, "ratios": {}}))


if __name__ == "__main__":
    main()
