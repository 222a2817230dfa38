"""What the ratio, label and router stages measured: loss ratios by content, and how good the router is."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.graph import last_of
from pipeline.report.figures import Picture, stage_picture
from pipeline.report.measured import evaluation
from pipeline.report.run_files import Missing, RunFiles
from pipeline.report.tables import Row, Table, number, percent
from pipeline.results.quality import EVALUATED_STAGE
from stages.outputs import METRICS_FILE

_ROUTER, _LABEL = "router", "label"


def routed_pictures(files: RunFiles) -> Picture:
    """Return the sheet of routed test pictures; raise Missing."""
    alt = (
        "Test pictures cut into tiles, each below its tokens. Compressed tiles are tinted and have blue "
        "frames, those at the full rate orange ones. "
        "Above each picture: kind, question, the routed model's answer, and whether it is right."
    )
    caption = "Test pictures with the router's decisions at the calibrated threshold"
    return stage_picture(files, EVALUATED_STAGE, "routed_pictures", alt, caption)


def ratios_by_content(files: RunFiles) -> Picture:
    """Return the box plots of loss ratios over test tiles; raise Missing."""
    alt = "Box plots of the loss ratio of test tiles, by what they show and by kind of record"
    caption = "Loss with a tile compressed divided by the loss at the full rate, test tiles"
    return stage_picture(files, EVALUATED_STAGE, "ratios_by_content", alt, caption)


def losses_by_kind(files: RunFiles) -> Picture:
    """Return the box plots of losses over labelled tiles; raise Missing."""
    alt = "Box plots of the losses of tiles at both rates, and of their ratio, by kind of record"
    caption = "Losses and labels of the tiles that the router learns from"
    return stage_picture(files, last_of(files.run.stages, _LABEL), "losses_by_kind", alt, caption)


def reliability(files: RunFiles) -> Picture:
    """Return the reliability figure of the router; raise Missing."""
    alt = "Share of tiles labelled keep by the router's probability of keep, for calibration and test tiles"
    stage = last_of(files.run.stages, _ROUTER)
    return stage_picture(files, stage, "reliability", alt, "Reliability of the router's probabilities")


def contents_table(files: RunFiles) -> Table:
    """Return the median loss ratio by what a tile shows; raise Missing."""
    contents: Mapping[str, Mapping[str, Any]] = evaluation(files).get("ratio_by_content") or {}
    if not contents:
        raise Missing("The records do not say what their tiles show.")
    rows = [
        Row((name, f"{ratio['tiles']:,}", number(ratio["median"], ".2f"))) for name, ratio in contents.items()
    ]
    columns = ("what a tile shows", "test tiles", "median loss ratio")
    return Table("Loss ratios by content", columns, rows, num_numbers=2)


def router_table(files: RunFiles) -> Table:
    """Return the router's metrics; raise Missing."""
    metrics: Mapping[str, Any] = files.json(last_of(files.run.stages, _ROUTER), METRICS_FILE)
    rows: Sequence[tuple[str, str | None]] = (
        ("AUC on all labelled test tiles", number(metrics["auc"])),
        ("AUC on calibration tiles", _with_spread(metrics)),
        ("expected calibration error on test tiles", number(metrics.get("ece"))),
        ("balanced accuracy on test tiles", number(metrics["balanced_accuracy"])),
        ("threshold for the wanted share (compress at or above)", f"{metrics['absolute_threshold']:.6g}"),
        *_wanted_quality(files),
        ("compressed calibration tiles: wanted", _share(metrics, "wanted_share")),
        ("compressed calibration tiles: reached", _share(metrics, "calibrated_share")),
        ("margin of the threshold, log-odds", _number(metrics, "threshold_margin", ".2g")),
        ("test tiles within the margin", _share(metrics, "share_in_margin")),
        ("blank tiles compressed", _blank(metrics)),
        ("tiles: train, calibration, test", _tiles(metrics)),
    )
    shown = [Row((name, value)) for name, value in rows if value is not None]
    return Table("Measures of the router", ("measure", "value"), shown)


def _wanted_quality(files: RunFiles) -> list[tuple[str, str]]:
    """Return the threshold for a wanted quality, which is exported then in place of the router stage's."""
    try:
        choice = evaluation(files).get("wanted_quality")
    except Missing:
        return []
    if not choice:
        return []
    kept = f"keeps {number(choice['quality_kept'])} on {choice['num_samples']:,} calibration samples"
    name = f"exported threshold, for a wanted quality of {choice['wanted']:g}"
    return [(name, f"{choice['threshold']:.6g} ({kept}{'' if choice['reached'] else '; not reached'})")]


def _with_spread(metrics: Mapping[str, Any]) -> str | None:
    if "auc_calib" not in metrics:
        return None
    spread, num_candidates = metrics["auc_calib_sd"], len(metrics["candidates"])
    return f"{metrics['auc_calib']:.3f} (best of {num_candidates}, standard deviation {spread:.2g})"


def _share(metrics: Mapping[str, Any], name: str) -> str | None:
    return percent(metrics[name]) if name in metrics else None


def _number(metrics: Mapping[str, Any], name: str, form: str) -> str | None:
    return number(metrics[name], form) if name in metrics else None


def _blank(metrics: Mapping[str, Any]) -> str | None:
    if "blank_tiles" not in metrics:
        return None
    return f"{metrics['blank_compressed']:,} of {metrics['blank_tiles']:,}"


def _tiles(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{metrics[name]:,}" for name in ("num_train", "num_calib", "num_test"))
