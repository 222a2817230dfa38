"""What the router is worth: the threshold calibrated on calib tiles, measures on test tiles."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.parts import Parts
from vico.errors import UserError
from vico.inference.routing import calibrated_threshold, expected_calibration_error
from vico.objectives.router import IGNORED


def publish_metrics(
    parts: Parts, label_folder: Path, compress_share: float | None
) -> dict[str, float | int | None]:
    """Of the published scores: the threshold calibrated on calib, measures on test; `metrics.json`, returned.

    `compress_share` None stands for the share that the labels of calib compress.
    Positive = label 1 = keep, score = probability of keep; a measure that needs both classes is null
    without them.
    """
    table = pq.read_table(parts.output / "scores.parquet")
    table = table.filter(pc.not_equal(table["label"], IGNORED))
    by_split = {split: table.filter(pc.equal(table["split"], split)) for split in ("calib", "test")}
    calib = by_split["calib"]
    if not len(calib):
        raise UserError("the calib split has no labelled tiles to calibrate on; raise shard.calib_share")
    share = compress_share
    if share is None:
        share = float(pc.mean(pc.equal(calib["label"], 0)).as_py())
    threshold = calibrated_threshold(calib["p_compress"].to_numpy(), share)
    labels = pq.read_table(label_folder / "labels.parquet", columns=["split"])["split"]
    metrics = {
        **measures(by_split["test"], threshold),
        "absolute_threshold": threshold,
        "calibrated_share": share,
        "num_train": int(pc.sum(pc.equal(labels, "train")).as_py()),
        "num_calib": len(calib),
        "num_test": len(by_split["test"]),
    }
    parts.write_json("metrics.json", metrics)
    return metrics


def measures(test: pa.Table, threshold: float) -> dict[str, float | None]:
    """AUC, accuracies at the threshold, ECE of test tiles."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    keep, p_compress = test["label"].to_numpy() == 1, test["p_compress"].to_numpy()
    predicted_keep = p_compress < threshold
    both = keep.any() and not keep.all()
    return {
        "auc": float(roc_auc_score(keep, 1 - p_compress)) if both else None,
        "accuracy": float((predicted_keep == keep).mean()) if len(keep) else None,
        "balanced_accuracy": float(balanced_accuracy_score(keep, predicted_keep)) if both else None,
        "positive_share": float(keep.mean()) if len(keep) else None,
        "ece": expected_calibration_error(1 - p_compress, keep) if len(keep) else None,
    }
