"""Figures of an evaluation: bands of intervals, and names from data."""

import json
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.collections import PolyCollection

from stages.controls import ALL, points_of
from stages.evaluate.plots import quality_against_tokens, ratios_by_group

KEPT = Path(__file__).parents[4] / "docs" / "figures" / "quickstart" / "metrics.json"


def test_quality_kept_and_exact_match_have_bands_of_their_own_intervals():
    metrics = json.loads(KEPT.read_text())
    for control in ALL:
        for point in points_of(metrics, control):
            point["exact_match_interval"] = [point["exact_match"] - 0.25, point["exact_match"] + 0.25]
    kept, exact = quality_against_tokens(metrics).axes
    kept_bands, exact_bands = (
        [part for part in axes.collections if isinstance(part, PolyCollection)] for axes in (kept, exact)
    )
    assert len(kept_bands) == len(exact_bands) > 1
    assert all(np.ptp(band.get_paths()[0].vertices[:, 1]) >= 0.5 for band in exact_bands)
    assert "95% intervals" in kept.get_title() and "95% intervals" in exact.get_title()


def test_names_with_dollar_signs_and_control_characters_are_drawn_as_text():
    names = [r"$\frac$", "$5 to $9", "\x1b[2J"] * 4
    ratios = np.linspace(0.5, 2, len(names))
    figure = ratios_by_group(ratios, [("by what they show", names)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a control character, for which the font has no glyph
        figure.savefig(BytesIO(), format="png")
    labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert labels == {r"$\frac$ (4)", "$5 to $9 (4)", r"\x1b[2J (4)"}
