"""Figures of an evaluation with names from data."""

import warnings
from io import BytesIO

import numpy as np

from stages.evaluate.plots import ratios_by_group


def test_names_with_dollar_signs_and_control_characters_are_drawn_as_text():
    names = [r"$\frac$", "$5 to $9", "\x1b[2J"] * 4
    ratios = np.linspace(0.5, 2, len(names))
    figure = ratios_by_group(ratios, [("by what they show", names)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a control character, for which the font has no glyph
        figure.savefig(BytesIO(), format="png")
    labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert labels == {r"$\frac$ (4)", "$5 to $9 (4)", r"\x1b[2J (4)"}
