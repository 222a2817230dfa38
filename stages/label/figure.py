"""The plot of the label stage: losses of tiles by kind of content."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stages.figures import draw_boxes
from stages.palette import BLUE, GREEN, ORANGE
from vico.shown_text import printable

SMALLEST_LOSS = 1e-6  # nats; smaller losses are drawn here, since a log axis has no 0


def losses_by_kind(ratios: pa.Table, labels: pa.Table) -> Figure:
    """Draw box plots of the tiles' losses and ratios, one row per kind, sorted by median ratio."""
    kinds = np.asarray(ratios["kind"].to_pylist())
    ratio = labels["ratio"].to_numpy()
    names = sorted(np.unique(kinds), key=lambda kind: float(np.median(ratio[kinds == kind])))
    masks = [kinds == kind for kind in names]
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_losses(left, ratios, masks)
    draw_boxes(right, [ratio[mask] for mask in masks], GREEN, 0.0, "ratio")
    tau = float(np.median(labels["tau"].to_numpy()))
    right.axvline(tau, color=ORANGE, linestyle="--", label=f"median tau {tau:.3g}")
    counts = [int(mask.sum()) for mask in masks]
    rows = [f"{printable(name)} ({count:,} tiles)" for name, count in zip(names, counts, strict=True)]
    left.set_yticks(range(len(names)), rows, parse_math=False)  # a name may have dollar signs
    right.set_xlabel("loss compressed / loss full, floor in both")
    right.set_title("Ratio: left of tau is labelled compress")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.grid(axis="x", alpha=0.3)
    right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_losses(axes: Axes, ratios: pa.Table, masks: Sequence[np.ndarray]) -> None:
    for column, colour, shift in (("loss_full", ORANGE, -0.18), ("loss_compressed", BLUE, 0.18)):
        values = np.maximum(ratios[column].to_numpy(), SMALLEST_LOSS)
        draw_boxes(axes, [values[mask] for mask in masks], colour, shift, column.replace("_", " "))
    axes.set_xlabel("KL to the reference, nats per answer token")
    axes.set_title("Losses of a tile at both rates")
