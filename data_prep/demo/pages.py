"""Demo pages: real prose, real source code, and prose with a photograph."""

import random

from data_prep.demo import sources
from data_prep.demo.canvas import BOLD, MONO, SANS, SERIF, Canvas, TextStyle, ink_on
from data_prep.demo.content import Content, Question, look_question, sheet
from data_prep.demo.lexicon import LEXICON
from data_prep.demo.photographs import photograph_crop

_LINE_PITCH = 1.25
"""Distance of two lines over the font size."""


def wrapped(
    canvas: Canvas, words: list[str], name: str, size: float, width: float, num_lines: int
) -> list[str]:
    """Break words into at most `num_lines` full lines of at most `width` tile units; leave out the rest."""
    lines: list[str] = []
    line = ""
    for word in words:
        longer = f"{line} {word}".strip()
        if line and canvas.measure(longer, name, size) > width:
            lines.append(line)
            line = word
            if len(lines) == num_lines:
                break
        else:
            line = longer
    return lines


def draw_lines(canvas: Canvas, lines: list[str], left: float, top: float, style: TextStyle) -> None:
    """Draw the lines of a page below each other."""
    for i, line in enumerate(lines):
        canvas.text(left, top + i * _LINE_PITCH * style.size, line, style)


def line_questions(rng: random.Random, lines: list[str]) -> list[Question]:
    """Ask, in random order, for transcriptions of the first two lines and the last line of a page."""
    numbered = list(zip(("first", "second"), lines, strict=False))
    if len(lines) > 2:
        numbered.append(("last", lines[-1]))
    rng.shuffle(numbered)
    return [
        Question(f"Transcribe the {ordinal} line.", line.strip(), "transcribe") for ordinal, line in numbered
    ]


def _page_sheet(rng: random.Random, group: int) -> tuple[Canvas, float, float, int]:
    """Draw an empty page; return it, font size and text width in tile units, and how many lines fit."""
    canvas = sheet(rng, group, ((1, 1), (2, 1), (2, 2)), (40, 15, 45), paper=True)
    size = rng.uniform(10.5, 14) if canvas.columns == 1 else rng.uniform(13, 18)
    return canvas, size, canvas.width - 8, int((canvas.height - 6) / (_LINE_PITCH * size))


def prose_picture(rng: random.Random, group: int) -> Content:
    """Draw a page of real prose; the questions ask for one line."""
    canvas, size, width, room = _page_sheet(rng, group)
    words = rng.choice(sources.group_passages(group)).split()
    start = rng.randrange(len(words) - 12)
    name = rng.choice((SANS, SERIF))
    lines = wrapped(canvas, words[start:], name, size, width, room)[: rng.randint(max(room - 4, 1), room)]
    draw_lines(canvas, lines, 4, 3, TextStyle(name, size, ink_on(rng, canvas.background)))
    return Content("prose", canvas, [*line_questions(rng, lines), look_question(rng, "page")])


def code_picture(rng: random.Random, group: int) -> Content:
    """Draw a page of real source code, its lines cut to the width."""
    canvas, size, width, room = _page_sheet(rng, group)
    listing = rng.choice(sources.group_listings(group))
    start = rng.randrange(len(listing) - 8)
    shown = listing[start : start + room]
    indent = min(len(line) - len(line.lstrip()) for line in shown)
    num_letters = int(width / canvas.measure("m", MONO, size))
    cut = (line[indent:].replace("    ", " ")[:num_letters].rstrip() for line in shown)
    lines = [line for line in cut if line]  # a line that is indented by the whole width shows nothing
    draw_lines(canvas, lines, 4, 3, TextStyle(MONO, size, ink_on(rng, canvas.background)))
    return Content("code", canvas, [*line_questions(rng, lines), look_question(rng, "page")])


def figure_picture(rng: random.Random, group: int) -> Content:
    """Draw a page with a heading, a few lines of prose and, above or below them, a photograph."""
    canvas = sheet(rng, group, ((1, 1), (2, 2)), (25, 75), paper=True)
    name = rng.choice((SANS, SERIF))
    heading = rng.choice(LEXICON)
    if canvas.columns > 1:
        heading_size, size = rng.uniform(22, 30), rng.uniform(13, 16)
    else:
        heading_size, size = rng.uniform(16, 20), 11.0
    ink = ink_on(rng, canvas.background)
    middle = canvas.height / 2
    figure_first = rng.random() < 0.5
    text_top, figure_top = (middle, 0.0) if figure_first else (0.0, middle)
    crop = photograph_crop(rng, group, (canvas.width - 12) / (middle - 12))
    canvas.photograph(crop, 6, figure_top + 6, canvas.width - 6, figure_top + middle - 6)
    canvas.text(4, text_top + 2, heading, TextStyle(BOLD, heading_size, ink))
    words = rng.choice(sources.group_passages(group)).split()
    start = rng.randrange(len(words) - 12)
    room = int((middle - 1.35 * heading_size - 3) / (_LINE_PITCH * size))
    lines = wrapped(canvas, words[start:], name, size, canvas.width - 8, room)[:room]
    draw_lines(canvas, lines, 4, text_top + 1.35 * heading_size + 2, TextStyle(name, size, ink))
    questions = [
        Question(rng.choice(("Which word is the heading?", "Read the heading.")), heading, "read"),
        look_question(rng, "page"),
    ]
    if lines:
        questions.append(line_questions(rng, lines[:1])[0])
        questions[-1] = Question("Transcribe the first line of the text.", questions[-1].answer, "transcribe")
    return Content("figure", canvas, questions)
