"""Figures of the stages, as PNG: losses by kind of content, training curves, routed pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stages.context import Context

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
ORANGE, BLUE, GREEN, PINK, SKY, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#777777"
SMALLEST_LOSS = 1e-6  # nats; losses below are drawn there, a log axis has no 0
SHEET_PICTURES, SHEET_COLUMNS = 12, 3


def publish_figure(context: Context, name: str, figure: Figure) -> None:
    """Writes `figures/<name>.png`, replacing that of an earlier attempt."""
    FigureCanvasAgg(figure)
    path = f"figures/{name}.png"
    figure.savefig(context.parts.partial(path), format="png", dpi=120)
    context.parts.publish(path, replace=True)


def losses_by_kind(ratios: pa.Table, labels: pa.Table) -> Figure:
    """Box plots over tiles: losses at both rates and ratios, a row a kind of content, sorted by median
    ratio.
    """
    kinds = np.asarray(ratios["kind"].to_pylist())
    ratio = labels["ratio"].to_numpy()
    names = sorted(np.unique(kinds), key=lambda kind: float(np.median(ratio[kinds == kind])))
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for column, colour, shift in (("loss_full", ORANGE, -0.18), ("loss_compressed", BLUE, 0.18)):
        values = np.maximum(ratios[column].to_numpy(), SMALLEST_LOSS)
        boxes(left, [values[kinds == kind] for kind in names], colour, shift, column.replace("_", " "))
    boxes(right, [ratio[kinds == kind] for kind in names], GREEN, 0.0, "ratio")
    tau = float(np.median(labels["tau"].to_numpy()))
    right.axvline(tau, color=ORANGE, linestyle="--", label=f"median tau {tau:.3g}")
    counts = [int((kinds == kind).sum()) for kind in names]
    left.set_yticks(range(len(names)), [f"{k} ({n:,} tiles)" for k, n in zip(names, counts, strict=True)])
    left.set_xlabel("KL to the reference, nats per answer token")
    right.set_xlabel("loss compressed / loss full, floor in both")
    left.set_title("Losses of a tile at both rates")
    right.set_title("Ratio: left of tau is labelled compress")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.grid(axis="x", alpha=0.3)
    right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def boxes(axes: Axes, values: Sequence[np.ndarray], colour: str, shift: float, label: str) -> None:
    """Horizontal boxes (quartiles, whiskers from 5 to 95 %) at 0, 1, ... moved by `shift`."""
    drawn = axes.boxplot(
        values,
        positions=np.arange(len(values)) + shift,
        widths=0.3,
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        medianprops={"color": "black"},
        manage_ticks=False,
    )
    for box in drawn["boxes"]:
        box.set(facecolor=colour, alpha=0.7)
    if drawn["boxes"]:
        drawn["boxes"][0].set_label(label)


def training_curves(stages: Mapping[str, pa.Table]) -> Figure:
    """A row a stage, from its `curve.parquet` (step, name, value): losses, other measures, learning rate."""
    figure = Figure(figsize=(12, 3.4 * len(stages)), layout="constrained")
    grid = figure.subplots(len(stages), 3, squeeze=False)
    for row, (stage, table) in zip(grid, stages.items(), strict=True):
        series = curves_of(table)
        groups: tuple[tuple[str, Callable[[str], bool], bool], ...] = (
            ("loss", lambda name: name == "loss" or "kl" in name or name.endswith("_loss"), True),
            ("other measures", lambda name: "accuracy" in name or name.startswith("share"), False),
            ("gradient norm and learning rate", lambda name: name in ("grad_norm", "learning_rate"), True),
        )
        for axes, (title, belongs, log) in zip(row, groups, strict=True):
            for name, (steps, values) in series.items():
                if belongs(name):
                    marker = "o" if len(steps) < 12 else None
                    axes.plot(
                        steps,
                        values,
                        label=name.replace("_", " "),
                        marker=marker,
                        markersize=3.5,
                        linewidth=1.2,
                    )
            if log and all((line.get_ydata() > 0).all() for line in axes.lines):
                axes.set_yscale("log")
            if not axes.lines:
                axes.set_axis_off()
                continue
            axes.set_title(f"{stage}: {title}", fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    return figure


def curves_of(table: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, values) by name, in order of steps."""
    names = np.asarray(table["name"].to_pylist())
    steps, values = table["step"].to_numpy(), table["value"].to_numpy()
    found = {}
    for name in sorted(set(names.tolist())):
        chosen = np.flatnonzero(names == name)
        chosen = chosen[np.argsort(steps[chosen], kind="stable")]
        found[name] = steps[chosen], values[chosen]
    return found


def picture_sheet(pictures: Sequence[tuple[str, Any]], legend: Sequence[tuple[str, Any, str]]) -> Figure:
    """(title, picture) pairs on a grid, as wide in each cell as the cell allows.

    `legend` is (label, colour, hatch) of each mark.
    """
    num_rows = max(1, -(-len(pictures) // SHEET_COLUMNS))
    figure = Figure(figsize=(4.4 * SHEET_COLUMNS, 3.7 * num_rows + 0.5), layout="constrained")
    grid = figure.subplots(num_rows, SHEET_COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, picture) in zip(grid, pictures, strict=False):
        axes.imshow(np.asarray(picture), interpolation="lanczos")
        axes.set_anchor("NW")
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    keys = [
        Patch(facecolor="white", edgecolor=colour, hatch=hatch, linewidth=2, label=label)
        for label, colour, hatch in legend
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=11, frameon=False)
    return figure


def read_curves(context: Context, stages: Sequence[str]) -> dict[str, pa.Table]:
    """The training curves of earlier stages."""
    return {stage: pq.read_table(Path(context.inputs[stage]) / "curve.parquet") for stage in stages}
