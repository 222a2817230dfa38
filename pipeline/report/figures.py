"""Figures of the page: drawings of recorded numbers as SVG, and pictures that the stages published.

All are images within the page (`data:`). An SVG in an image runs no script and loads nothing.
"""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from pipeline.report.measured import evaluation
from pipeline.report.run_files import Missing, RunFiles
from pipeline.results.attempt_metrics import first_values
from stages.outputs import FIGURES_FOLDER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stages.evaluate.training_curves import Curve, Panel

_LARGE_BYTES = 400_000
"""A larger picture is stored as WebP, about a fifth of a PNG of photographs."""
_CURVE_POINTS = 500
"""Of a longer curve, the mean of as many equal pieces is drawn."""
_INK, _PAPER = "#000000", "#ffffff"
_DARK_INK, _DARK_PAPER = "#e6e8ea", "#171b20"
"""The colours of text and background of the page's dark scheme."""


@dataclass(frozen=True)
class Picture:
    """An image. `dark` is the same for a dark page; None: it is shown on white there, too."""

    light: Markup
    alt: str
    caption: str
    width: int
    height: int
    dark: Markup | None = None


def quality_curve(files: RunFiles) -> Picture:
    """Draw quality kept over tokens saved, for the router and all controls; raise Missing."""
    from matplotlib.ticker import PercentFormatter

    from stages.evaluate.plots import draw_panel

    metrics = evaluation(files)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        draw_panel(axes, metrics, "quality_kept")
        axes.set_ylabel("quality kept")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=9, frameon=False)

    caption = (
        f"Quality kept against visual tokens saved. Bands: {metrics['intervals']['level']:.0%} intervals."
    )
    alt = "Curves of quality kept over visual tokens saved, for the router and each control; numbers below."
    return _drawing((5.2, 6.8), draw, alt, caption)


def training_figures(files: RunFiles) -> list[Picture]:
    """Draw the losses and other metrics of each training by step, also of one that has not ended.

    Raises Missing if no training has begun.
    """
    pictures = [picture for stage in files.run.stages for picture in _stage_figures(files, stage)]
    if not pictures:
        raise Missing("No training of this run has recorded a step.")
    return pictures


def _stage_figures(files: RunFiles, stage: str) -> list[Picture]:
    from stages.evaluate.training_curves import PANELS, draw_curves

    attempts = files.attempts(stage)
    curves = {} if attempts is None else curves_of_attempts(first_values(attempts))
    if "loss" not in curves:
        return []  # not a training
    num_steps = int(max(steps[-1] for steps, _ in curves.values()))

    def picture(panel: "Panel", drawn: "Mapping[str, Curve]") -> Picture:
        names = ", ".join(name.replace("_", " ") for name in drawn)
        alt = f"{panel.title} of stage {stage} over {num_steps:,} steps: {names}"
        caption = f"{stage}: {panel.title}, {num_steps:,} steps"
        return _drawing((4.2, 3.8), lambda f: draw_curves(f.subplots(), stage, panel, drawn), alt, caption)

    panels = [
        (panel, {name: curve for name, curve in curves.items() if panel.belongs(name)}) for panel in PANELS
    ]
    return [picture(panel, drawn) for panel, drawn in panels if drawn]


def curves_of_attempts(values: Mapping[str, Mapping[int, float]]) -> "dict[str, Curve]":
    """Return metric -> (steps, values) by step; a long curve as means of equal pieces."""
    curves = {}
    for name, by_step in values.items():
        steps = np.array(sorted(by_step), np.float64)
        numbers = np.array([by_step[int(step)] for step in steps], np.float64)
        numbers[~np.isfinite(numbers)] = np.nan
        if len(steps) > _CURVE_POINTS:
            pieces = np.linspace(0, len(steps), _CURVE_POINTS + 1).astype(int)[:-1]
            lengths = np.diff([*pieces, len(steps)])
            steps, numbers = (np.add.reduceat(each, pieces) / lengths for each in (steps, numbers))
        curves[name] = steps, numbers
    return curves


def _drawing(
    inches: tuple[float, float], draw: Callable[["Figure"], object], alt: str, caption: str
) -> Picture:
    """Return what `draw` draws on a figure as SVG, for a light and a dark page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "vico"}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    light = text.getvalue()
    dark = light.replace(_INK, _DARK_INK).replace(_PAPER, _DARK_PAPER)
    dark = dark.replace("<svg ", f'<svg fill="{_DARK_INK}" ', 1)  # of text, which names no colour if black
    svgs = [_data("image/svg+xml", svg.encode()) for svg in (light, dark)]
    width, height = (round(96 * length) for length in inches)
    return Picture(svgs[0], alt, caption, width, height, dark=svgs[1])


def stage_picture(files: RunFiles, stage: str, name: str, alt: str, caption: str) -> Picture:
    """Return a PNG that a stage published; raise Missing."""
    from PIL import Image, UnidentifiedImageError

    path = files.path(stage, f"{FIGURES_FOLDER}/{name}.png")
    data, kind = path.read_bytes(), "image/png"
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            width, height = image.size
            if len(data) > _LARGE_BYTES:
                small = io.BytesIO()
                image.convert("RGB").save(small, "WEBP", quality=85)
                data, kind = small.getvalue(), "image/webp"
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise Missing(f"{path.name} of stage {stage} is not a PNG ({error}).") from error
    return Picture(_data(kind, data), alt, caption, width, height)


def _data(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")
