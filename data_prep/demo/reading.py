"""Demo pictures that must be read: numbers and words in four forms, pages of prose and code."""

import random

from data_prep.demo import sources
from data_prep.demo.canvas import BOLD, MONO, SANS, SERIF, TILE, Canvas, ink_on
from data_prep.demo.content import Content, Question, look_question, sheet
from data_prep.demo.lexicon import LEXICON
from data_prep.demo.photographs import photograph_crop

_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_PLACES = {
    (2, 1): ("on the left", "on the right"),
    (1, 2): ("at the top", "at the bottom"),
    (2, 2): ("at the top left", "at the top right", "at the bottom left", "at the bottom right"),
}
_LETTERS = "ABCDEFGH"
_SIZES = ((13, 16), (18, 26), (30, 42))  # tile units: small, medium, large
_LINE = 1.25  # line height over font size


def _items(rng: random.Random, noun: str, group: int, count: int) -> list[str]:
    """Different numbers or words of the group; numbers of three digits are the most frequent."""
    if noun == "word":
        return rng.sample(LEXICON, count)
    numbers = [str(n) for n in sources.group_numbers(group)]
    return (
        rng.sample([n for n in numbers if len(n) < 4], count)
        if rng.random() < 0.7
        else rng.sample(numbers, count)
    )


def put_text(
    canvas: Canvas, rng: random.Random, text: str, size: float, box: tuple[float, float, float, float]
) -> None:
    """Draws a text somewhere inside a box, smaller where it would not fit."""
    left, top, right, bottom = box
    name = rng.choice((SANS, SANS, BOLD, SERIF, MONO))
    width = canvas.measure(text, name, size)
    if width > right - left - 4:
        size *= (right - left - 4) / width
        width = canvas.measure(text, name, size)
    x = rng.uniform(left + 2, max(right - 2 - width, left + 2))
    y = rng.uniform(top + 1, max(bottom - 1 - _LINE * size, top + 1))
    canvas.text(x, y, text, name, size, ink_on(rng, canvas.background))


def reading_picture(rng: random.Random, group: int, noun: str) -> Content:
    """A picture of numbers or words (`noun`), in one of four forms."""
    form = rng.choices((_single, _listing, _labelled, _cells), (48, 20, 14, 18))[0]
    return form(rng, group, noun)


def _single(rng: random.Random, group: int, noun: str) -> Content:
    canvas = sheet(rng, group, ((1, 1), (2, 1), (1, 2)), (78, 11, 11))
    text = _items(rng, noun, group, 1)[0]
    size = rng.uniform(*rng.choices(_SIZES, (46, 27, 27))[0])
    if canvas.columns * canvas.rows > 1:
        size = max(size, 22)
    put_text(canvas, rng, text, size, (0, 0, canvas.width, canvas.height))
    question = rng.choice((f"Which {noun} is shown?", f"Which {noun} is this?", f"Read the {noun}."))
    return Content(noun, canvas, [Question(question, text, "read"), look_question(rng, noun)])


def _lines(rng: random.Random, canvas: Canvas, texts: list[str]) -> None:
    """Texts one under another at one size, with the left margin and line height that fit."""
    name = rng.choice((SANS, SANS, BOLD, SERIF, MONO))
    room = canvas.height / len(texts)
    size = min(rng.uniform(13, 17), room / _LINE) * min(canvas.columns, canvas.rows) ** 0.75
    widest = max(canvas.measure(text, name, size) for text in texts)
    size *= min(1.0, (canvas.width - 8) / widest)
    pitch = rng.uniform(min(_LINE * size, room), room)
    left = rng.uniform(3, max(canvas.width - 4 - widest, 3))
    top = rng.uniform(0, canvas.height - pitch * len(texts))
    ink = ink_on(rng, canvas.background)
    for i, text in enumerate(texts):
        canvas.text(left, top + i * pitch, text, name, size, ink)


def _listing(rng: random.Random, group: int, noun: str) -> Content:
    canvas = sheet(rng, group, ((1, 1), (2, 2)), (75, 25))
    texts = _items(rng, noun, group, rng.randint(2, 4))
    _lines(rng, canvas, texts)
    questions = [
        Question(rng.choice((f"Which {noun} is {place}?", f"Read the {place} {noun}.")), text, "read")
        for place, text in zip(_ORDINALS, texts, strict=False)
    ]
    rng.shuffle(questions)
    return Content(noun, canvas, questions)


def _labelled(rng: random.Random, group: int, noun: str) -> Content:
    canvas = sheet(rng, group, ((1, 1), (2, 2)), (75, 25))
    texts = _items(rng, noun, group, rng.randint(2, 4))
    labels = rng.sample(_LETTERS, len(texts))
    _lines(rng, canvas, [f"{label} {text}" for label, text in zip(labels, texts, strict=True)])
    questions = [
        Question(
            rng.choice((f"Which {noun} is next to {label}?", f"Read the {noun} after {label}.")), text, "read"
        )
        for label, text in zip(labels, texts, strict=True)
    ]
    return Content(noun, canvas, questions)


def _cells(rng: random.Random, group: int, noun: str) -> Content:
    """One text, photograph or nothing a tile: only some of the tiles matter to the question."""
    canvas = sheet(rng, group, ((2, 1), (1, 2), (2, 2)), (25, 25, 50))
    places = _PLACES[canvas.columns, canvas.rows]
    num_texts = rng.randint(1, len(places) - 1)
    texts = _items(rng, noun, group, num_texts) + [""] * (len(places) - num_texts)
    rng.shuffle(texts)
    questions = []
    for i, (place, text) in enumerate(zip(places, texts, strict=True)):
        column, row = i % canvas.columns, i // canvas.columns
        box = (TILE * column, TILE * row, TILE * column + TILE, TILE * row + TILE)
        if text:
            put_text(canvas, rng, text, rng.uniform(*rng.choices(_SIZES, (60, 25, 15))[0]), box)
            questions.append(Question(f"Which {noun} is {place}?", text, "read"))
        elif group in sources.photo_groups():
            canvas.photograph(photograph_crop(rng, group, 1.0), *box)
    if num_texts == 1:
        questions = [Question(f"Which {noun} is shown?", questions[0].answer, "read"), *questions]
    else:
        rng.shuffle(questions)
    return Content(noun, canvas, questions)


def wrapped(
    canvas: Canvas, words: list[str], name: str, size: float, width: float, num_lines: int
) -> list[str]:
    """The words set in lines of at most `width` tile units."""
    lines, line = [], ""
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


def set_lines(canvas: Canvas, lines: list[str], left: float, top: float, name: str, size: float, ink) -> None:
    """Lines of a page, one under another."""
    for i, line in enumerate(lines):
        canvas.text(left, top + i * _LINE * size, line, name, size, ink)


def line_questions(rng: random.Random, lines: list[str]) -> list[Question]:
    """Transcriptions of the first two lines and the last one of a page."""
    named = list(zip(("first", "second"), lines, strict=False))
    if len(lines) > 2:
        named.append(("last", lines[-1]))
    rng.shuffle(named)
    return [Question(f"Transcribe the {place} line.", line.strip(), "transcribe") for place, line in named]


def _page_sheet(rng: random.Random, group: int) -> tuple[Canvas, float, float, int]:
    """A sheet, its font size, the column's width in tile units and the number of lines that fit."""
    canvas = sheet(rng, group, ((1, 1), (2, 1), (2, 2)), (40, 15, 45), paper=True)
    size = rng.uniform(10.5, 14) if canvas.columns == 1 else rng.uniform(13, 18)
    return canvas, size, canvas.width - 8, int((canvas.height - 6) / (_LINE * size))


def prose_picture(rng: random.Random, group: int) -> Content:
    """A page of real prose; the questions ask for one line."""
    canvas, size, width, room = _page_sheet(rng, group)
    words = rng.choice(sources.group_passages(group)).split()
    start = rng.randrange(len(words) - 12)
    name = rng.choice((SANS, SERIF))
    lines = wrapped(canvas, words[start:], name, size, width, room)[: rng.randint(max(room - 4, 1), room)]
    set_lines(canvas, lines, 4, 3, name, size, ink_on(rng, canvas.background))
    return Content("prose", canvas, [*line_questions(rng, lines), look_question(rng, "page")])


def code_picture(rng: random.Random, group: int) -> Content:
    """A page of real source code, cut to the lines that fit the width."""
    canvas, size, width, room = _page_sheet(rng, group)
    listing = rng.choice(sources.group_listings(group))
    start = rng.randrange(len(listing) - 8)
    shown = listing[start : start + room]
    indent = min(len(line) - len(line.lstrip()) for line in shown)
    num_letters = int(width / canvas.measure("m", MONO, size))
    lines = [line[indent:].replace("    ", " ")[:num_letters].rstrip() for line in shown]
    set_lines(canvas, lines, 4, 3, MONO, size, ink_on(rng, canvas.background))
    return Content("code", canvas, [*line_questions(rng, lines), look_question(rng, "page")])


def text_question(rng: random.Random, group: int) -> Question:
    """A question a text-only row asks: repeat, compare, or count letters."""
    words = rng.sample(LEXICON, 3)
    first, second = rng.sample(sources.group_numbers(group), 2)
    form = rng.randrange(4)
    if form == 0:
        return Question(f"Repeat the word {words[0]}.", words[0], "text")
    if form == 1:
        return Question(f"Which number is larger, {first} or {second}?", str(max(first, second)), "text")
    if form == 2:
        place = rng.randrange(3)
        name = ("first", "second", "third")[place]
        return Question(f"Which word is {name}: {words[0]}, {words[1]}, {words[2]}?", words[place], "text")
    return Question(f"Repeat the numbers {first} and {second}.", f"{first} and {second}", "text")
