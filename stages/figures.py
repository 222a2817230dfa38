"""Plots of the stages: publish them as PNG, draw box plots."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stages.context import Context
from stages.outputs import FIGURES_FOLDER


def publish_figure(context: Context, name: str, figure: Figure) -> None:
    """Write `figures/<name>.png`, replacing the file of an earlier attempt."""
    FigureCanvasAgg(figure)
    path = f"{FIGURES_FOLDER}/{name}.png"
    figure.savefig(context.parts.partial(path), format="png", dpi=120)
    context.parts.publish(path, replace=True)


def draw_boxes(axes: Axes, values: Sequence[np.ndarray], colour: str, shift: float, label: str) -> None:
    """Draw horizontal boxes (quartiles, whiskers from 5 to 95 %) at 0, 1, ... moved by `shift`."""
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
