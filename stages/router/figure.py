"""The reliability figure of the router stage: predicted against observed shares of keep."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from stages.palette import BLACK, BLUE, GREY, ORANGE
from vico.inference.calibration import reliability


def reliability_figure(tiles: Mapping[str, pa.Table], threshold: float) -> Figure:
    """Draw one panel per table (`p_compress`, `label`): share of tiles labelled keep by the router's
    probability of keep, above a histogram of that probability."""
    figure = Figure(figsize=(5.2 * len(tiles), 5.2), layout="constrained")
    grid = figure.subplots(2, len(tiles), squeeze=False, sharex=True, height_ratios=(3, 1))
    for column, (name, table) in enumerate(tiles.items()):
        p_keep, keep = 1 - table["p_compress"].to_numpy(), table["label"].to_numpy() == 1
        _draw_reliability(grid[0, column], name, p_keep, keep)
        grid[1, column].hist(p_keep, bins=np.linspace(0, 1, 41), color=GREY)
        grid[1, column].set_xlabel("probability of keep")
        grid[1, column].set_ylabel("tiles")
        for axes in grid[:, column]:
            axes.axvline(
                1 - threshold,
                color=ORANGE,
                linestyle="--",
                label="threshold: left is compressed",
            )
            axes.grid(alpha=0.3)
        grid[0, column].legend(fontsize=8, loc="upper left")
        grid[1, column].xaxis.set_major_formatter(PercentFormatter(1.0))
    grid[0, 0].set_ylabel("share labelled keep")
    return figure


def _draw_reliability(axes: Axes, name: str, p_keep: np.ndarray, keep: np.ndarray) -> None:
    bins = reliability(p_keep, keep)
    axes.plot([0, 1], [0, 1], ":", color=BLACK, linewidth=1, label="probabilities are true")
    axes.plot(bins.predicted_K, bins.observed_K, "o-", color=BLUE, label=f"{len(keep):,} tiles in bins")
    axes.set_title(f"{name}: expected calibration error {bins.error:.3f}", fontsize=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
