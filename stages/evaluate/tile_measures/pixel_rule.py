"""The pixel rule, a control without a network: rank tiles by three measures of their pixels.

Shapes: N tiles, F measures.
"""

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
from stages.controls import PIXEL_RULE
from stages.evaluate.config import BLOCK_SAMPLES, EvaluateConfig
from stages.evaluate.points import UNLABELLED
from stages.evaluate.tile_measures.pixel_features import FEATURES, TileMeasurer
from stages.inference import inference_settings
from stages.outputs import SCORES_FILE, TILES_FILE
from vico.objectives.labels import KEEP

TileKey = tuple[str, int, int]
"""Key of the sample, number of the image, number of the tile."""
TILE_KEY_COLUMNS = ("key", "image", "tile")
SMALLEST_F = np.array([0.01, 1.0, 1.0])
"""Is added to the measures before the logarithm, in their units: differences below it are noise."""
Aucs = dict[str, float | None]
"""AUC of each measure (FEATURES) and, if there is a rule, of the rule, keep above compress; null unless both
labels occur."""


class PixelRuleFit(TypedDict):
    """The rule's weight of each measure, null without calib tiles of both labels, and the AUC of it and
    of each measure.

    A weight is the change of the log-odds of keep per standard deviation of the measure's logarithm.
    """

    weights: dict[str, float] | None
    auc_calib: Aucs
    auc_test: Aucs


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


def tile_keys(table: pa.Table) -> list[TileKey]:
    """Return the keys of a table with one row per tile."""
    return list(zip(*(table[name].to_pylist() for name in TILE_KEY_COLUMNS), strict=True))


def tile_labels(context: Context) -> dict[TileKey, int]:
    """Return the label of each calib and test tile that the router stage scored; 1 keep, 0 compress."""
    scores = pq.read_table(context.folder("router") / SCORES_FILE)
    scores = scores.filter(pc.is_in(scores["label"], pa.array([0, 1], scores["label"].type)))
    return dict(zip(tile_keys(scores), scores["label"].to_pylist(), strict=True))


def fitted_pixel_rule(
    measured: pa.Table, labels: Mapping[TileKey, int]
) -> tuple[PixelRuleFit, np.ndarray | None]:
    """Fit a logistic regression of the labels of calib tiles on the logarithms of all measures.

    Also return its log-odds of keep, float64, one per row of `measured`, or None without calib tiles of both
    labels. One measure alone ranks worse, because photographs have as much detail as text and need less;
    together they separate edges from texture.

    The labels decide, not the answers: they are what the router itself is trained to rank, and answering the
    calib samples for every rule and threshold would cost as much as the evaluation.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    label_N = np.array([labels.get(key, UNLABELLED) for key in tile_keys(measured)], np.int8)
    split_N = measured["split"].to_numpy()
    measure_NF = np.stack([measured[name].to_numpy() for name in FEATURES], axis=1)
    scores = {name: measure_NF[:, number] for number, name in enumerate(FEATURES)}
    calib_N = (split_N == "calib") & (label_N != UNLABELLED)
    weights = None
    if len(np.unique(label_N[calib_N])) == 2:
        log_NF = np.log(measure_NF + SMALLEST_F)
        rule = make_pipeline(StandardScaler(), LogisticRegression())
        rule.fit(log_NF[calib_N], label_N[calib_N])
        scores[PIXEL_RULE.name] = rule.decision_function(log_NF)
        weights = dict(zip(FEATURES, rule[-1].coef_[0].tolist(), strict=True))
    return {
        "weights": weights,
        "auc_calib": _aucs(scores, label_N, calib_N),
        "auc_test": _aucs(scores, label_N, (split_N == "test") & (label_N != UNLABELLED)),
    }, scores.get(PIXEL_RULE.name)


def _aucs(scores: Mapping[str, np.ndarray], label_N: np.ndarray, chosen_N: np.ndarray) -> Aucs:
    from sklearn.metrics import roc_auc_score

    keep = label_N[chosen_N] == KEEP
    if not keep.any() or keep.all():
        return dict.fromkeys(scores)
    return {name: float(roc_auc_score(keep, score_N[chosen_N])) for name, score_N in scores.items()}
