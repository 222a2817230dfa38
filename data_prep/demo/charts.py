"""Demo charts: bars of real values."""

import random
from dataclasses import dataclass

from data_prep.demo import sources
from data_prep.demo.canvas import (
    BOLD,
    COLOURS,
    SANS,
    Box,
    Canvas,
    Colour,
    TextStyle,
    group_colour,
    ink_on,
)
from data_prep.demo.content import Content, Question, colour_question, look_question, sheet

_LETTERS = "ABCDEFGH"
_BAR_COLOURS = ("red", "orange", "green", "blue", "purple", "brown")
_AXIS = (60, 60, 60)


@dataclass(frozen=True)
class Bars:
    """The bars of a chart: values, labels, their colour, and the size of the text in tile units."""

    values: list[int]
    labels: list[str]
    colour: Colour
    text_size: float


def draw_bars(canvas: Canvas, rng: random.Random, bars: Bars, box: Box) -> None:
    """Draw vertical bars in a box of tile units, each with its value above and its label below."""
    left, top, right, bottom = box
    size = bars.text_size
    name = rng.choice((SANS, BOLD))
    axis = bottom - 1.3 * size
    room = axis - top - 1.4 * size
    pitch = (right - left) / len(bars.values)
    style = TextStyle(name, size, ink_on(rng, canvas.background))
    for i, (value, label) in enumerate(zip(bars.values, bars.labels, strict=True)):
        centre = left + (i + 0.5) * pitch
        height = room * value / max(bars.values)
        canvas.rectangle(centre - 0.32 * pitch, axis - height, centre + 0.32 * pitch, axis, bars.colour)
        text_left = centre - canvas.measure(str(value), name, size) / 2
        canvas.text(text_left, axis - height - 1.2 * size, str(value), style)
        canvas.text(centre - canvas.measure(label, name, size) / 2, axis + 1, label, style)
    canvas.rectangle(left, axis, right, axis + 0.6, _AXIS)


def chart_picture(rng: random.Random, group: int) -> Content:
    """Draw a bar chart of two to five real values; the questions ask for the value of a bar."""
    canvas = sheet(rng, group, ((1, 1), (2, 1), (2, 2)), (60, 15, 25))
    table = rng.choice(sources.group_tables(group))
    count = rng.randint(2, 4) if canvas.columns == 1 else rng.randint(3, 5)
    start = rng.randint(0, len(table) - count)
    values = list(table[start : start + count])
    labels = list(_LETTERS[:count])
    names = [name for name in _BAR_COLOURS if abs(sum(COLOURS[name]) - sum(canvas.background)) > 90]
    colour = rng.choice(names)
    if canvas.columns == 1:
        size = rng.uniform(12, 15)
    else:
        size = rng.uniform(13, 17) if canvas.rows == 1 else rng.uniform(18, 26)
    bars = Bars(values, labels, group_colour(rng, colour, sources.NUM_GROUPS - 1), size)
    draw_bars(canvas, rng, bars, (4, 3, canvas.width - 4, canvas.height - 2))
    questions = [
        Question(
            rng.choice((f"What is the value of bar {label}?", f"How high is bar {label}?")),
            str(value),
            "read",
        )
        for label, value in zip(labels, values, strict=True)
    ]
    rng.shuffle(questions)
    looks = [look_question(rng, "chart"), colour_question("Which colour are the bars?", colour)]
    rng.shuffle(looks)
    return Content("chart", canvas, [*questions, *looks])
