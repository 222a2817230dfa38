"""What a demo picture is: kind, drawing, the questions it can answer; and the sheet it starts from."""

import random
from dataclasses import dataclass

from data_prep.demo.canvas import COLOURS, Canvas, group_colour


@dataclass(frozen=True)
class Question:
    """A question and its answer; `task`: read (exact), transcribe (similarity), look (nothing to read)."""

    text: str
    answer: str
    task: str


@dataclass
class Content:
    """A drawn picture, its kind of content and every question it can answer, the preferred ones first."""

    kind: str
    canvas: Canvas
    questions: list[Question]
    format_name: str = "PNG"


_PAPERS = ("white", "white", "white", "yellow", "pink", "gray", "blue", "black")


def sheet(rng: random.Random, group: int, grids, weights, paper: bool = False) -> Canvas:
    """An empty picture of one of the grids: its scale, paper colour and faint noise drawn at random."""
    columns, rows = rng.choices(grids, weights)[0]
    # Under the tiling rule one tile stays one up to a scale of 1.4, 2 x 2 tiles stay four from 0.75 on.
    scale = rng.choice((1.0, rng.uniform(0.8, 1.4)))
    name = "white" if paper and rng.random() < 0.8 else rng.choice(_PAPERS)
    canvas = Canvas(columns, rows, scale, group_colour(rng, name, group))
    if rng.random() < 0.15:
        canvas.speckle(rng, rng.randint(1, 5))
    return canvas


def look_question(rng: random.Random, what: str) -> Question:
    """A question about the whole picture that needs no reading; `what` answers it."""
    return Question(
        rng.choice(("What kind of picture is this?", "What does the picture show?")), what, "look"
    )


def colour_question(text: str, colour: str) -> Question:
    assert colour in COLOURS
    return Question(text, colour, "look")
