"""The plot of the training curves of the consistency and router stages."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.context import Context
from stages.outputs import CURVE_FILE

Curve = tuple[np.ndarray, np.ndarray]
"""(steps, values)."""
_PANELS: tuple[tuple[str, Callable[[str], bool], bool], ...] = (  # title, whether a metric belongs, log axis
    ("loss", lambda name: name == "loss" or "kl" in name or name.endswith("_loss"), True),
    ("other measures", lambda name: "accuracy" in name or name.startswith("share"), False),
    ("gradient norm and learning rate", lambda name: name in ("grad_norm", "learning_rate"), True),
)
_SHORT_CURVE = 12
"""With fewer steps than this, each step has a mark."""


def read_curves(context: Context, stages: Sequence[str]) -> dict[str, pa.Table]:
    """Return the `curve.parquet` of earlier stages."""
    return {stage: pq.read_table(context.folder(stage) / CURVE_FILE) for stage in stages}


def training_curves(tables: Mapping[str, pa.Table]) -> Figure:
    """Plot one row per stage from its `curve.parquet` (step, name, value)."""
    figure = Figure(figsize=(12, 3.4 * len(tables)), layout="constrained")
    grid = figure.subplots(len(tables), len(_PANELS), squeeze=False)
    for row, (stage, table) in zip(grid, tables.items(), strict=True):
        curves = curves_of(table)
        for axes, (title, belongs, is_log) in zip(row, _PANELS, strict=True):
            drawn = {name: curve for name, curve in curves.items() if belongs(name)}
            _draw_curves(axes, f"{stage}: {title}", drawn, is_log)
    return figure


def _draw_curves(axes: Axes, title: str, curves: Mapping[str, Curve], is_log: bool) -> None:
    if not curves:
        axes.set_axis_off()
        return
    for name, (steps, values) in curves.items():
        axes.plot(
            steps,
            values,
            label=name.replace("_", " "),
            marker="o" if len(steps) < _SHORT_CURVE else None,
            markersize=3.5,
            linewidth=1.2,
        )
    if is_log and all((values > 0).all() for _, values in curves.values()):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


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
