"""The plot of the training curves of the consistency and router stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.context import Context
from stages.outputs import CURVE_FILE
from vico.shown_text import printable

Curve = tuple[np.ndarray, np.ndarray]
"""(steps, values)."""


@dataclass(frozen=True)
class Panel:
    """One plot of a row: its title, its unit, and whether a metric belongs to it."""

    title: str
    unit: str
    belongs: Callable[[str], bool]
    is_log: bool = False


def _is_ratio(name: str) -> bool:
    return name.endswith("_over_best")


PANELS = (
    Panel(
        "loss",
        "nats",
        lambda name: not _is_ratio(name) and (name == "loss" or "kl" in name or name.endswith("_loss")),
        is_log=True,
    ),
    Panel("validation KL / its best", "ratio", _is_ratio),
    Panel("shares", "share", lambda name: "accuracy" in name or name.startswith("share")),
    Panel("AUC on calibration tiles", "AUC", lambda name: name.startswith("validation_auc")),
    Panel("gradient norm", "norm before clipping", lambda name: name == "grad_norm", is_log=True),
    Panel("learning rate", "learning rate", lambda name: name == "learning_rate"),
)
_SHORT_CURVE = 12
"""With fewer steps than this, each step has a mark."""
_LONG_CURVE = 60
"""From so many steps on, the running mean is drawn over the values."""


def read_curves(context: Context, stages: Sequence[str]) -> dict[str, pa.Table]:
    """Return the `curve.parquet` of earlier stages."""
    return {stage: pq.read_table(context.folder(stage) / CURVE_FILE) for stage in stages}


def training_curves(tables: Mapping[str, pa.Table]) -> Figure:
    """Plot one row per stage from its `curve.parquet` (step, name, value).

    A long curve is a thin line of its values below a bold line of their running mean.
    """
    all_curves = {stage: curves_of(table) for stage, table in tables.items()}
    panels = [
        panel
        for panel in PANELS
        if any(panel.belongs(name) for curves in all_curves.values() for name in curves)
    ]
    figure = Figure(figsize=(4.1 * len(panels), 4.0 * len(tables)), layout="constrained")
    grid = figure.subplots(len(tables), len(panels), squeeze=False)
    for row, (stage, curves) in zip(grid, all_curves.items(), strict=True):
        for axes, panel in zip(row, panels, strict=True):
            drawn = {name: curve for name, curve in curves.items() if panel.belongs(name)}
            draw_curves(axes, stage, panel, drawn)
    return figure


def draw_curves(axes: Axes, stage: str, panel: Panel, curves: Mapping[str, Curve]) -> None:
    """Draw the curves of one panel of a stage; without any, hide the axes."""
    if not curves:
        axes.set_axis_off()
        return
    for number, (name, (steps, values)) in enumerate(curves.items()):
        colour, label = f"C{number}", printable(name.replace("_", " ")).replace("$", r"\$")
        if len(steps) < _LONG_CURVE or name == "learning_rate":
            is_short = len(steps) < _SHORT_CURVE
            marker = "o" if is_short else None
            axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.4)
            continue
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(steps, running_mean(values), color=colour, label=label, linewidth=1.6)
    if panel.is_log and all((values > 0).all() for _, values in curves.values()):
        axes.set_yscale("log")
    axes.set_title(f"{stage}: {panel.title}", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)
    # below the axes, where it covers no line
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of 1/20 of the curve; at its ends the window is shorter."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    numbers = np.arange(len(values))
    low, high = np.maximum(numbers - half, 0), np.minimum(numbers + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def curves_of(table: pa.Table) -> dict[str, Curve]:
    """Return the curve of each metric, by steps."""
    names = np.asarray(table["name"].to_pylist())
    steps, values = table["step"].to_numpy(), table["value"].to_numpy()
    curves = {}
    for name in sorted(set(names.tolist())):
        rows = np.flatnonzero(names == name)
        rows = rows[np.argsort(steps[rows], kind="stable")]
        curves[name] = steps[rows], values[rows]
    return curves
