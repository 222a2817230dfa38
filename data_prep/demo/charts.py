"""Demo charts of real tables, and pages with a figure: a photograph or chart set into prose."""

import random

from data_prep.demo import sources
from data_prep.demo.canvas import BOLD, COLOURS, SANS, SERIF, Canvas, group_colour, ink_on
from data_prep.demo.content import Content, Question, colour_question, look_question, sheet
from data_prep.demo.lexicon import LEXICON
from data_prep.demo.photographs import photograph_crop
from data_prep.demo.reading import line_questions, set_lines, wrapped

_LETTERS = "ABCDEFGH"
_BAR_COLOURS = ("red", "orange", "green", "blue", "purple", "brown")
_AXIS = (60, 60, 60)


def draw_bars(
    canvas: Canvas,
    rng: random.Random,
    values: list[int],
    labels: list[str],
    colour: tuple[int, int, int],
    size: float,
    box: tuple[float, float, float, float],
) -> None:
    """Vertical bars in a box of tile units: the value stands on each bar, its label under the axis."""
    left, top, right, bottom = box
    name = rng.choice((SANS, BOLD))
    floor = bottom - 1.3 * size
    room = floor - top - 1.4 * size
    pitch = (right - left) / len(values)
    ink = ink_on(rng, canvas.background)
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        centre = left + (i + 0.5) * pitch
        height = room * value / max(values)
        canvas.rectangle(centre - 0.32 * pitch, floor - height, centre + 0.32 * pitch, floor, colour)
        text = str(value)
        canvas.text(
            centre - canvas.measure(text, name, size) / 2, floor - height - 1.2 * size, text, name, size, ink
        )
        canvas.text(centre - canvas.measure(label, name, size) / 2, floor + 1, label, name, size, ink)
    canvas.rectangle(left, floor, right, floor + 0.6, _AXIS)


def chart_picture(rng: random.Random, group: int) -> Content:
    """A bar chart of three to five real values; the questions ask for the value of a bar."""
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
    box = (4, 3, canvas.width - 4, canvas.height - 2)
    draw_bars(canvas, rng, values, labels, group_colour(rng, colour, sources.NUM_GROUPS - 1), size, box)
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


def figure_picture(rng: random.Random, group: int) -> Content:
    """A page with a heading, a few lines of prose and, above or below them, a photograph."""
    canvas = sheet(rng, group, ((1, 1), (2, 2)), (25, 75), paper=True)
    many = canvas.columns > 1
    name = rng.choice((SANS, SERIF))
    heading = rng.choice(LEXICON)
    heading_size, size = (rng.uniform(22, 30), rng.uniform(13, 16)) if many else (rng.uniform(16, 20), 11)
    ink = ink_on(rng, canvas.background)
    middle = canvas.height / 2
    figure_first = rng.random() < 0.5
    text_top, figure_top = (middle, 0) if figure_first else (0, middle)
    crop = photograph_crop(rng, group, (canvas.width - 12) / (middle - 12))
    canvas.photograph(crop, 6, figure_top + 6, canvas.width - 6, figure_top + middle - 6)
    canvas.text(4, text_top + 2, heading, BOLD, heading_size, ink)
    words = rng.choice(sources.group_passages(group)).split()
    start = rng.randrange(len(words) - 12)
    room = int((middle - 1.35 * heading_size - 3) / (1.25 * size))
    lines = wrapped(canvas, words[start:], name, size, canvas.width - 8, room)[:room]
    set_lines(canvas, lines, 4, text_top + 1.35 * heading_size + 2, name, size, ink)
    questions = [
        Question(rng.choice(("Which word is the heading?", "Read the heading.")), heading, "read"),
        look_question(rng, "page"),
    ]
    if lines:
        questions.append(line_questions(rng, lines[:1])[0])
        questions[-1] = Question("Transcribe the first line of the text.", questions[-1].answer, "transcribe")
    return Content("figure", canvas, questions)
