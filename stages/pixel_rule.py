"""The control that learns nothing: tiles ranked by one measure of their pixels, chosen on calib."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.tasks import actor_pool
from data_prep.index import load_index
from stages.context import Context
from stages.evaluate import BLOCK_SAMPLES, SCORES_FILE, TILES_FILE, EvaluateConfig
from stages.inference import inference_settings
from stages.sample_choice import chosen_rows
from stages.tile_measures import FEATURES, TileMeasurer


def measured_tiles(config: EvaluateConfig, context: Context, samples: pa.Table) -> pa.Table:
    """`tiles.parquet`: pixel measures of the tiles of the chosen test samples, and of as many calib ones."""
    parts = context.parts
    if parts.done(TILES_FILE):
        return pq.read_table(parts.output / TILES_FILE)
    calib = load_index(context.inputs["shard"]).table(["num_tiles"], "calib")
    calib_rows = calib.filter(pc.greater(calib["num_tiles"], 0))["row"].to_numpy()
    rows = chosen_rows(calib_rows, config.max_samples, config.seed).tolist() + samples["row"].to_pylist()
    items = [rows[first : first + BLOCK_SAMPLES] for first in range(0, len(rows), BLOCK_SAMPLES)]
    actor = (inference_settings(context, config.dtype), demo_sources(context.inputs))
    found: dict[int, pa.Table] = {}
    for number, table in actor_pool(
        TileMeasurer, actor, items, "measures", site=context.site, check=context.check
    ):
        found[number] = table
        context.progress(len(found), len(items), "blocks of tiles measured")
    tiles = pa.concat_tables([found[number] for number in sorted(found)])
    pq.write_table(tiles, parts.partial(TILES_FILE))
    parts.publish(TILES_FILE)
    return tiles


def demo_sources(inputs: Mapping) -> dict:
    """Source name -> records config, for those inputs that are the built-in demo."""
    named = {"demo": inputs["records"], "heldout-demo": inputs["heldout"]}
    return {name: config for name, config in named.items() if config is not None and config.format == "demo"}


def feature_aucs(measured: pa.Table, labels: Mapping[tuple, int], split: str) -> dict[str, float | None]:
    """How well each measure ranks the labelled tiles of a split, keep above compress; null without both
    labels.
    """
    from sklearn.metrics import roc_auc_score

    tiles = measured.filter(pc.equal(measured["split"], split))
    places = list(zip(*(tiles[name].to_pylist() for name in ("key", "image", "tile")), strict=True))
    known = np.array([place in labels for place in places], bool)
    keep = np.array([labels[place] == 1 for place in places if place in labels], bool)
    if not keep.any() or keep.all():
        return dict.fromkeys(FEATURES)
    return {name: float(roc_auc_score(keep, tiles[name].to_numpy()[known])) for name in FEATURES}


def tile_labels(context: Context) -> dict[tuple, int]:
    """Label of each tile of calib and test that the router stage scored; 1 keep, 0 compress."""
    scores = pq.read_table(context.inputs["router"] / SCORES_FILE)
    scores = scores.filter(pc.is_in(scores["label"], pa.array([0, 1], scores["label"].type)))
    columns = (scores[name].to_pylist() for name in ("key", "image", "tile", "label"))
    return {(key, image, tile): label for key, image, tile, label in zip(*columns, strict=True)}


def pixel_rule_choice(measured: pa.Table, labels: Mapping[tuple, int]) -> dict:
    """The measure that ranks calib tiles best by their labels, and the AUC of all of them on calib and test.

    By the labels rather than by answers: this is what the router itself is trained to rank, and answers of
    calib samples at every measure and threshold would cost as much as the evaluation. `feature` is null where
    calib has no tiles of both labels: then there is no rule.
    """
    calib = feature_aucs(measured, labels, "calib")
    known = {name: auc for name, auc in calib.items() if auc is not None}
    return {
        "feature": max(known, key=known.__getitem__) if known else None,
        "auc_calib": calib,
        "auc_test": feature_aucs(measured, labels, "test"),
    }
