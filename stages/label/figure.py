"""The figure of the label stage: losses of tiles by kind of content."""

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stages.figures import BLUE, GREEN, ORANGE, boxes

SMALLEST_LOSS = 1e-6  # nats; losses below are drawn there, a log axis has no 0


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
