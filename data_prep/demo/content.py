"""The content of a demo picture: kind, canvas and questions; and the empty canvas that it starts from."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.demo.canvas import COLOURS, Canvas, group_colour


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    `task`: read (a number, word or value), transcribe (a line), look (nothing to read), text (no picture).
    """

    text: str
    answer: str
    task: str


@dataclass
class Content:
    """A drawn picture, its kind of content and all questions about it, the preferred ones first."""

    kind: str
    canvas: Canvas
    questions: list[Question]
    format_name: str = "PNG"


_PAPERS = ("white", "white", "white", "yellow", "pink", "gray", "blue", "black")


def sheet(
    rng: random.Random,
    group: int,
    grids: Sequence[tuple[int, int]],
    weights: Sequence[float],
    paper: bool = False,
) -> Canvas:
    """Return an empty canvas with a random grid, scale and colour, and perhaps faint noise.

    The grid is one of `grids` (columns, rows), drawn by `weights`. With `paper` most canvases are white.
    """
    columns, rows = rng.choices(grids, weights)[0]
    # The tiling rule keeps one tile up to a scale of 1.4, and 2 x 2 tiles from a scale of 0.75.
    scale = rng.choice((1.0, rng.uniform(0.8, 1.4)))
    name = "white" if paper and rng.random() < 0.8 else rng.choice(_PAPERS)
    canvas = Canvas(columns, rows, scale, group_colour(rng, name, group))
    if rng.random() < 0.15:
        canvas.speckle(rng, rng.randint(1, 5))
    return canvas


def look_question(rng: random.Random, answer: str) -> Question:
    """Draw a question about the whole picture that needs no reading."""
    return Question(
        rng.choice(("What kind of picture is this?", "What does the picture show?")), answer, "look"
    )


def colour_question(text: str, colour: str) -> Question:
    assert colour in COLOURS
    return Question(text, colour, "look")
