"""Figures of the stages, as PNG: losses by kind of content, training curves, routed pictures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stages.context import Context

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
ORANGE, BLUE, GREEN, PINK, SKY, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#777777"


def publish_figure(context: Context, name: str, figure: Figure) -> None:
    """Writes `figures/<name>.png`, replacing that of an earlier attempt."""
    FigureCanvasAgg(figure)
    path = f"figures/{name}.png"
    figure.savefig(context.parts.partial(path), format="png", dpi=120)
    context.parts.publish(path, replace=True)


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
