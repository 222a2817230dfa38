"""The plots of an evaluation: quality against visual tokens with all controls, loss ratios by content."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from stages.context import Context
from stages.figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, boxes

CURVES = (  # entry of metrics.json, label, colour, line, whether its interval is drawn as a band
    ("random", "random tiles", GREY, "--", True),
    ("shuffled", "router, decisions shuffled", SKY, ":", False),
    ("pixel_rule", "pixel rule", PINK, "-.", False),
    ("oracle", "oracle (the tiles' own ratios)", GREEN, "--", True),
    ("routed", "router", ORANGE, "-", True),
)


def quality_against_tokens(metrics: Mapping[str, Any]) -> Figure:
    """Similarity kept and exact match over tokens saved: the router, the controls, both ends, the served
    rule.
    """
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column in ((left, "quality_kept"), (right, "exact_match")):
        for name, label, colour, line, band in CURVES:
            curve(axes, metrics, name, column, colour=colour, line=line, label=label, band=band)
        ends(axes, metrics, column)
        axes.set_xlabel("visual tokens saved")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    left.set_ylabel("similarity (ANLS) kept of the reference's")
    right.set_ylabel("questions answered exactly")
    basis = metrics["intervals"]
    left.set_title(
        f"Quality kept; bands: {basis['level']:.0%} intervals over test {basis['unit']}s", fontsize=10
    )
    right.set_title("Exact match", fontsize=10)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        f"Quality against visual tokens, {metrics['num_samples']:,} test questions on "
        f"{metrics['num_tiles']:,} tiles",
        fontsize=12,
    )
    return figure


def curve(
    axes: Axes, metrics: Mapping[str, Any], name: str, column: str, *, colour, line, label, band: bool
) -> None:
    """One entry's points in order of tokens saved, joined to both ends, which all entries share."""
    points = sorted((e for e in metrics[name] if e[column] is not None), key=lambda e: e["tokens_saved"])
    if not points:
        return
    joined = [metrics["full"], *points, metrics["compressed"]]
    x, y = ([point[key] for point in joined] for key in ("tokens_saved", column))
    z = 4 if name == "routed" else 2
    axes.plot(x, y, line, color=colour, label=label, linewidth=2.2 if name == "routed" else 1.4, zorder=z)
    axes.plot(x[1:-1], y[1:-1], "o", color=colour, markersize=4, zorder=z)
    spans = [point["quality_kept_interval"] for point in joined]
    if band and column == "quality_kept" and None not in spans:
        low, high = zip(*spans, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0, zorder=1)


def ends(axes: Axes, metrics: Mapping[str, Any], column: str) -> None:
    """Reference, both ends of the policy, the served rule and the calibrated point, each with its own
    mark.
    """
    calibrated = [e for e in metrics["routed"] if e["threshold"] == metrics["absolute_threshold"]]
    reference = metrics["reference"][column]
    if reference is not None:
        axes.axhline(reference, color="black", linewidth=0.9, linestyle=":", label="start model, full rate")
    marks = (
        (metrics["full"], "trained, all tiles at the full rate", "black", "s", 48),
        (metrics["compressed"], "trained, all tiles at the low rate", BLUE, "s", 48),
        *((entry, "router at its calibrated threshold", ORANGE, "D", 75) for entry in calibrated),
        *((entry, "published rule, one prompt a call", "#000000", "X", 70) for entry in metrics["served"]),
    )
    for entry, label, colour, mark, size in marks:
        if entry[column] is not None:
            style = {"marker": mark, "s": size, "color": colour, "zorder": 5, "edgecolors": "white"}
            axes.scatter([entry["tokens_saved"]], [entry[column]], label=label, **style)


def ratios_by_content(ratio_N: np.ndarray, groups: Sequence[tuple[str, Sequence[str | None]]]) -> Figure:
    """Box plots of the tiles' loss ratios on a log axis, a panel for each way to group them (title, group of
    each tile, None: left out), sorted by median, with the medians in figures.
    """
    named = [(title, np.array([name or "" for name in names])) for title, names in groups]
    named = [(title, names_N) for title, names_N in named if (names_N != "").any()]
    num_rows = max(len(np.unique(names_N[names_N != ""])) for _, names_N in named)
    figure = Figure(figsize=(6.2 * len(named), 1.8 + 0.42 * num_rows), layout="constrained")
    for axes, (title, names_N) in zip(figure.subplots(1, len(named), squeeze=False)[0], named, strict=True):
        found = {str(name): ratio_N[names_N == name] for name in np.unique(names_N) if name}
        order = sorted(found, key=lambda name: float(np.median(found[name])))
        boxes(axes, [found[name] for name in order], GREEN, 0.0, "quartiles; whiskers from 5 to 95 %")
        axes.set_yticks(range(len(order)), [f"{name} ({len(found[name]):,})" for name in order])
        for y, name in enumerate(order):
            median = float(np.median(found[name]))
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            place = {"ha": "center", "va": "bottom", "fontsize": 8}
            axes.annotate(f"{median:.2f}", (median, y + 0.2), bbox=paper, **place)
        axes.set_ylim(-0.6, len(order) - 0.3)
        axes.set_xscale("log")
        axes.axvline(1.0, color="black", linewidth=0.9, linestyle=":")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("loss with the tile compressed / loss at the full rate")
    key = [
        Line2D([], [], color=GREEN, alpha=0.7, linewidth=8, label="quartiles, whiskers 5 to 95 %, median"),
        Line2D([], [], color="black", linestyle=":", label="compressing costs nothing"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


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


def read_curves(context: Context, stages: Sequence[str]) -> dict[str, pa.Table]:
    """The training curves of earlier stages."""
    return {stage: pq.read_table(Path(context.inputs[stage]) / "curve.parquet") for stage in stages}
