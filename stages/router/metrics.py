"""The quality of the router: the threshold calibrated on calib tiles, metrics on test tiles."""

from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.outputs import LABELS_FILE, METRICS_FILE, SCORES_FILE
from stages.parts import Parts
from vico.errors import UserError
from vico.inference.routing import calibrated_threshold, expected_calibration_error
from vico.objectives.router import IGNORED


class SplitMetrics(TypedDict):
    """Metrics on the tiles of a split; those that need tiles, or both labels, are null without them."""

    auc: float | None
    accuracy: float | None
    balanced_accuracy: float | None
    positive_share: float | None
    ece: float | None


class RouterMetrics(SplitMetrics):
    """`metrics.json` of the stage."""

    absolute_threshold: float
    calibrated_share: float
    num_train: int
    num_calib: int
    num_test: int


def publish_metrics(parts: Parts, label_folder: Path, compress_share: float | None) -> RouterMetrics:
    """Calibrate the threshold on calib, measure the published scores on test, publish and return the metrics.

    With `compress_share` None the threshold compresses the share that the labels of calib compress.
    """
    table = pq.read_table(parts.output / SCORES_FILE)
    table = table.filter(pc.not_equal(table["label"], IGNORED))
    calib, test = (table.filter(pc.equal(table["split"], split)) for split in ("calib", "test"))
    if not len(calib):
        raise UserError("the calib split has no labelled tiles to calibrate on; raise shard.calib_share")
    share = compress_share
    if share is None:
        share = float(pc.mean(pc.equal(calib["label"], 0)).as_py())
    threshold = calibrated_threshold(calib["p_compress"].to_numpy(), share)
    split_of_label = pq.read_table(label_folder / LABELS_FILE, columns=["split"])["split"]
    metrics: RouterMetrics = {
        **split_metrics(test, threshold),
        "absolute_threshold": threshold,
        "calibrated_share": share,
        "num_train": int(pc.sum(pc.equal(split_of_label, "train")).as_py()),
        "num_calib": len(calib),
        "num_test": len(test),
    }
    parts.write_json(METRICS_FILE, metrics)
    return metrics


def split_metrics(tiles: pa.Table, threshold: float) -> SplitMetrics:
    """Return AUC, accuracies at the threshold, the share of keep, and ECE.

    Label 1 (keep) is positive and the score is the probability of keep.
    """
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    keep, p_compress = tiles["label"].to_numpy() == 1, tiles["p_compress"].to_numpy()
    predicted_keep = p_compress < threshold
    has_tiles, has_both = bool(len(keep)), bool(keep.any() and not keep.all())
    return {
        "auc": float(roc_auc_score(keep, 1 - p_compress)) if has_both else None,
        "accuracy": float(np.mean(predicted_keep == keep)) if has_tiles else None,
        "balanced_accuracy": float(balanced_accuracy_score(keep, predicted_keep)) if has_both else None,
        "positive_share": float(keep.mean()) if has_tiles else None,
        "ece": expected_calibration_error(1 - p_compress, keep) if has_tiles else None,
    }
