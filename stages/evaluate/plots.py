"""The plots of an evaluation: quality against visual tokens, and loss ratios by group of tiles."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from stages.controls import (
    COMPARED,
    COMPRESSED,
    FEWER_TILES,
    FULL,
    REFERENCE,
    ROUTED,
    SERVED,
    Control,
    PointMetrics,
    calibrated_points,
    point_of,
    points_of,
)
from stages.figures import draw_boxes
from stages.palette import GREEN
from vico.shown_text import printable

# N tiles
Quality = Literal["quality_kept", "exact_match"]


def quality_against_tokens(metrics: Mapping[str, Any]) -> Figure:
    """Plot similarity kept and exact match over tokens saved, for the router and all controls."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_panel(left, metrics, "quality_kept")
    draw_panel(right, metrics, "exact_match")
    left.set_ylabel("similarity (ANLS), share of the reference's")
    right.set_ylabel("questions answered exactly")
    basis = metrics["intervals"]
    bands = f"bands: {basis['level']:.0%} intervals over test {basis['unit']}s"
    left.set_title(f"Quality kept; {bands}", fontsize=10)
    right.set_title(f"Exact match; {bands}", fontsize=10)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        f"Quality against visual tokens, {metrics['num_samples']:,} test questions on "
        f"{metrics['num_tiles']:,} tiles",
        fontsize=12,
    )
    return figure


def draw_panel(axes: Axes, metrics: Mapping[str, Any], quality: Quality) -> None:
    """Draw the curves of the router and all controls, and the marks of single points, over tokens saved."""
    for control in (*(c for c in COMPARED if c.is_shown), FEWER_TILES, ROUTED):
        draw_curve(axes, metrics, control, quality)
    draw_marks(axes, metrics, quality)
    axes.set_xlabel("visual tokens saved")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)


def draw_curve(axes: Axes, metrics: Mapping[str, Any], control: Control, quality: Quality) -> None:
    """Draw a control's points by tokens saved, joined to the ends that it shares with the others."""
    measured = [point for point in points_of(metrics, control) if point[quality] is not None]
    if not measured:
        return
    measured.sort(key=lambda point: point["tokens_saved"])
    low_end = [point_of(metrics, COMPRESSED)] if control.has_low_end else []
    joined = [point_of(metrics, FULL), *measured, *low_end]
    x = [point["tokens_saved"] for point in joined]
    y = np.array([point[quality] for point in joined], np.float64)
    is_router = control is ROUTED
    width, order = (2.2, 4) if is_router else (1.4, 2)
    axes.plot(x, y, control.line, color=control.colour, label=control.label, linewidth=width, zorder=order)
    num_own = len(measured)
    axes.plot(x[1 : 1 + num_own], y[1 : 1 + num_own], "o", color=control.colour, markersize=4, zorder=order)
    kept = quality == "quality_kept"
    spans = [point["quality_kept_interval" if kept else "exact_match_interval"] for point in joined]
    if control.has_band and None not in spans:
        low, high = zip(*spans, strict=True)
        axes.fill_between(x, low, high, color=control.colour, alpha=0.13, linewidth=0, zorder=1)


def draw_marks(axes: Axes, metrics: Mapping[str, Any], quality: Quality) -> None:
    """Draw a line for the reference and a mark for each end, the served rule and the calibrated point."""
    reference = point_of(metrics, REFERENCE)[quality]
    if reference is not None:
        axes.axhline(
            reference, color=REFERENCE.colour, linewidth=0.9, linestyle=REFERENCE.line, label=REFERENCE.label
        )
    for control in (FULL, COMPRESSED):
        _draw_mark(axes, control, control.label, point_of(metrics, control), quality)
    for point in calibrated_points(metrics):
        _draw_mark(axes, ROUTED, f"{ROUTED.label} at its calibrated threshold", point, quality)
    for point in points_of(metrics, SERVED):
        _draw_mark(axes, SERVED, SERVED.label, point, quality)


def _draw_mark(axes: Axes, control: Control, label: str, point: PointMetrics, quality: Quality) -> None:
    value = point[quality]
    if value is not None:
        axes.scatter(
            [point["tokens_saved"]],
            [value],
            label=label,
            marker=control.marker,
            s=control.marker_area,
            color=control.colour,
            zorder=5,
            edgecolors="white",
        )


def ratios_by_group(ratio_N: np.ndarray, groups: Sequence[tuple[str, Sequence[str | None]]]) -> Figure:
    """Draw box plots of the tiles' loss ratios on a log axis, sorted by median, with the medians as numbers.

    `groups` are the panels: a title, and the group of each tile, None to leave it out.
    """
    panels = [(title, np.array([name or "" for name in names])) for title, names in groups]
    panels = [(title, names_N) for title, names_N in panels if (names_N != "").any()]
    num_rows = max(len(np.unique(names_N[names_N != ""])) for _, names_N in panels)
    figure = Figure(figsize=(6.2 * len(panels), 1.8 + 0.42 * num_rows), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, names_N) in zip(grid, panels, strict=True):
        _draw_ratios(axes, {str(name): ratio_N[names_N == name] for name in np.unique(names_N) if name})
        axes.set_title(title, fontsize=11)
    key = [
        Line2D([], [], color=GREEN, alpha=0.7, linewidth=8, label="quartiles, whiskers 5 to 95 %, median"),
        Line2D([], [], color="black", linestyle=":", label="compressing costs nothing"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _draw_ratios(axes: Axes, ratios: Mapping[str, np.ndarray]) -> None:
    medians = {name: float(np.median(values)) for name, values in ratios.items()}
    order = sorted(medians, key=medians.__getitem__)
    draw_boxes(axes, [ratios[name] for name in order], GREEN, 0.0, "quartiles; whiskers from 5 to 95 %")
    labels = [f"{printable(name)} ({len(ratios[name]):,})" for name in order]
    axes.set_yticks(range(len(order)), labels, parse_math=False)  # a name may have dollar signs
    for y, name in enumerate(order):
        axes.annotate(
            f"{medians[name]:.2f}",
            (medians[name], y + 0.2),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axes.set_ylim(-0.6, len(order) - 0.3)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.9, linestyle=":")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("loss with the tile compressed / loss at the full rate")
