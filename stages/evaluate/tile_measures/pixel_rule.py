"""The pixel rule, a control without training: rank tiles by one measure of their pixels."""

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.tasks import actor_pool
from data_prep.draws import chosen_rows
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import demo_sets
from data_prep.shards.index import load_index
from stages.context import Context
from stages.evaluate.config import BLOCK_SAMPLES, EvaluateConfig
from stages.evaluate.tile_measures.pixel_features import FEATURES, TileMeasurer
from stages.inference import inference_settings
from stages.outputs import SCORES_FILE, TILES_FILE

TileKey = tuple[str, int, int]
"""Key of the sample, number of the image, number of the tile."""
TILE_KEY_COLUMNS = ("key", "image", "tile")
FeatureAucs = dict[str, float | None]


class PixelRuleChoice(TypedDict):
    """The chosen measure, null without calib tiles of both labels, and the AUC of all measures."""

    feature: str | None
    auc_calib: FeatureAucs
    auc_test: FeatureAucs


def measured_tiles(config: EvaluateConfig, context: Context, samples: pa.Table) -> pa.Table:
    """Return `tiles.parquet`: pixel measures of the tiles of test samples and of as many calib samples."""
    parts = context.parts
    if parts.done(TILES_FILE):
        return pq.read_table(parts.output / TILES_FILE)
    calib = load_index(context.folder("shard")).table(["num_tiles"], "calib")
    calib_rows = calib.filter(pc.greater(calib["num_tiles"], 0))["row"].to_numpy()
    rows = chosen_rows(calib_rows, config.max_samples, config.seed).tolist() + samples["row"].to_pylist()
    blocks = [rows[first : first + BLOCK_SAMPLES] for first in range(0, len(rows), BLOCK_SAMPLES)]
    arguments = (inference_settings(context, config.dtype), demo_sources(context.records, context.heldout))
    tables: dict[int, pa.Table] = {}
    for number, table in actor_pool(
        TileMeasurer, arguments, blocks, "measures", site=context.site, check=context.check
    ):
        tables[number] = table
        context.progress(len(tables), len(blocks), "blocks of tiles measured")
    tiles = pa.concat_tables([tables[number] for number in sorted(tables)])
    pq.write_table(tiles, parts.partial(TILES_FILE))
    parts.publish(TILES_FILE)
    return tiles


def demo_sources(records: RecordsConfig | None, heldout: RecordsConfig | None) -> dict[str, RecordsConfig]:
    """Map source names to records configs, for those inputs that are the built-in demo."""
    training = {} if records is None else demo_sets(records)
    return training | ({} if heldout is None else demo_sets(heldout, heldout=True))


def feature_aucs(measured: pa.Table, labels: Mapping[TileKey, int], split: str) -> FeatureAucs:
    """Return how well each measure ranks keep above compress on the labelled tiles of a split.

    The values are null unless both labels occur.
    """
    from sklearn.metrics import roc_auc_score

    tiles = measured.filter(pc.equal(measured["split"], split))
    keys = tile_keys(tiles)
    labelled = np.array([key in labels for key in keys], bool)
    keep = np.array([labels[key] == 1 for key in keys if key in labels], bool)
    if not keep.any() or keep.all():
        return dict.fromkeys(FEATURES)
    return {name: float(roc_auc_score(keep, tiles[name].to_numpy()[labelled])) for name in FEATURES}


def tile_keys(table: pa.Table) -> list[TileKey]:
    """Return the keys of a table with one row per tile."""
    return list(zip(*(table[name].to_pylist() for name in TILE_KEY_COLUMNS), strict=True))


def tile_labels(context: Context) -> dict[TileKey, int]:
    """Return the label of each calib and test tile that the router stage scored; 1 keep, 0 compress."""
    scores = pq.read_table(context.folder("router") / SCORES_FILE)
    scores = scores.filter(pc.is_in(scores["label"], pa.array([0, 1], scores["label"].type)))
    return dict(zip(tile_keys(scores), scores["label"].to_pylist(), strict=True))


def pixel_rule_choice(measured: pa.Table, labels: Mapping[TileKey, int]) -> PixelRuleChoice:
    """Choose the measure that ranks the labels of calib tiles best; also return all AUCs on calib and test.

    The labels decide, not the answers: they are what the router itself is trained to rank, and answering the
    calib samples for every measure and threshold would cost as much as the evaluation.
    """
    calib = feature_aucs(measured, labels, "calib")
    aucs = {name: auc for name, auc in calib.items() if auc is not None}
    return {
        "feature": max(aucs, key=aucs.__getitem__) if aucs else None,
        "auc_calib": calib,
        "auc_test": feature_aucs(measured, labels, "test"),
    }
