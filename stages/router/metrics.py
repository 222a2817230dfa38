"""The quality of the router: the threshold calibrated on calib tiles, metrics on test tiles, spread over
candidates."""

from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.context import Context
from stages.figures import publish_figure
from stages.outputs import BLANK_SPLIT, LABELS_FILE, METRICS_FILE, SCORES_FILE
from stages.router.best_routers import BestRouters
from stages.router.config import RouterConfig
from stages.router.figure import reliability_figure
from vico.errors import UserError
from vico.inference.calibration import THIN_MARGIN, Threshold, placed_threshold, reliability, share_near
from vico.objectives.router import IGNORED


class SplitMetrics(TypedDict):
    """Metrics on the tiles of a split; those that need tiles, or both labels, are null without them."""

    auc: float | None
    accuracy: float | None
    balanced_accuracy: float | None
    positive_share: float | None
    ece: float | None


class CandidateMetrics(TypedDict):
    """The best validation of a candidate: updates made and AUC on calibration tiles."""

    step: int
    auc_calib: float


class RouterMetrics(SplitMetrics):
    """`metrics.json` of the stage. Margins are in log-odds; `share_in_margin` is that of test tiles."""

    absolute_threshold: float
    wanted_share: float
    calibrated_share: float
    threshold_margin: float
    share_in_margin: float
    blank_tiles: int
    blank_compressed: int
    candidates: list[CandidateMetrics]
    auc_calib: float
    auc_calib_sd: float
    num_train: int
    num_calib: int
    num_test: int


def publish_metrics(config: RouterConfig, context: Context, num_steps: int) -> RouterMetrics:
    """Calibrate the threshold on calib, measure the published scores on test, publish and return the metrics.

    With `compress_share` null the threshold compresses the share that the labels of calib compress. Notes a
    thin margin and blank tiles that are kept.
    """
    parts = context.parts
    table = pq.read_table(parts.output / SCORES_FILE)
    table = table.filter(pc.not_equal(table["label"], IGNORED))
    calib, test, blank = (table.filter(pc.equal(table["split"], s)) for s in ("calib", "test", BLANK_SPLIT))
    if not len(calib):
        raise UserError("the calib split has no labelled tiles to calibrate on; raise shard.calib_share")
    share = config.compress_share
    if share is None:
        share = float(pc.mean(pc.equal(calib["label"], 0)).as_py())
    p_blank, p_test = blank["p_compress"].to_numpy(), test["p_compress"].to_numpy()
    threshold = placed_threshold(calib["p_compress"].to_numpy(), share, config.share_tolerance, p_blank)
    _note_weaknesses(context, threshold, len(blank), config)
    split_of_label = pq.read_table(context.folder("label") / LABELS_FILE, columns=["split"])["split"]
    metrics: RouterMetrics = {
        **split_metrics(test, threshold.value),
        "absolute_threshold": threshold.value,
        "wanted_share": share,
        "calibrated_share": threshold.share,
        "threshold_margin": threshold.margin,
        "share_in_margin": share_near(p_test, threshold.value, threshold.margin),
        "blank_tiles": len(blank),
        "blank_compressed": len(blank) - threshold.num_blank_kept,
        **_of_candidates(config, context, num_steps),
        "num_train": int(pc.sum(pc.equal(split_of_label, "train")).as_py()),
        "num_calib": len(calib),
        "num_test": len(test),
    }
    parts.write_json(METRICS_FILE, metrics)
    panels = {"calibration tiles": calib, "test tiles": test}
    publish_figure(context, "reliability", reliability_figure(panels, threshold.value))
    return metrics


class _CandidateSummary(TypedDict):
    candidates: list[CandidateMetrics]
    auc_calib: float
    auc_calib_sd: float


def _of_candidates(config: RouterConfig, context: Context, num_steps: int) -> _CandidateSummary:
    best = BestRouters(context.parts, config.candidates, config.patience, lambda value: value).best(num_steps)
    aucs = [auc for _, auc in best]
    return {
        "candidates": [{"step": step, "auc_calib": auc} for step, auc in best],
        "auc_calib": max(aucs),
        "auc_calib_sd": float(np.std(aucs, ddof=1)) if len(aucs) > 1 else 0.0,
    }


def _note_weaknesses(context: Context, threshold: Threshold, num_blank: int, config: RouterConfig) -> None:
    if threshold.margin < THIN_MARGIN:
        context.note(
            f"the threshold {threshold.value:.6g} is only {threshold.margin:.2g} in log-odds from the "
            "nearest score, so rounding may change decisions; raise router.share_tolerance "
            f"({config.share_tolerance}) or shard.calib_share"
        )
    if threshold.num_blank_kept:
        context.note(
            f"the threshold keeps {threshold.num_blank_kept} of {num_blank} blank tiles at the full rate; "
            f"raise router.blank_share ({config.blank_share}), router.share_tolerance or "
            "router.compress_share"
        )


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
        "ece": reliability(1 - p_compress, keep).error if has_tiles else None,
    }
