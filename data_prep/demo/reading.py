"""Demo pictures of numbers and words in four forms, and the questions of rows without a picture."""

import random

from data_prep.demo import sources
from data_prep.demo.canvas import BOLD, MONO, SANS, SERIF, TILE, Box, Canvas, TextStyle, ink_on
from data_prep.demo.content import Content, Question, look_question, sheet
from data_prep.demo.lexicon import LEXICON
from data_prep.demo.photographs import photograph_crop

_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_POSITIONS = {
    (2, 1): ("on the left", "on the right"),
    (1, 2): ("at the top", "at the bottom"),
    (2, 2): ("at the top left", "at the top right", "at the bottom left", "at the bottom right"),
}
_LETTERS = "ABCDEFGH"
_SIZES = ((13, 16), (18, 26), (30, 42))  # small, medium and large text, in tile units
_LINE_HEIGHT = 1.25  # over the font size


def _distinct_texts(rng: random.Random, noun: str, group: int, count: int) -> list[str]:
    """Draw different words, or numbers of the group; most numbers have at most three digits."""
    if noun == "word":
        return rng.sample(LEXICON, count)
    numbers = [str(number) for number in sources.group_numbers(group)]
    if rng.random() < 0.7:
        numbers = [number for number in numbers if len(number) < 4]
    return rng.sample(numbers, count)


def put_text(canvas: Canvas, rng: random.Random, text: str, size: float, box: Box) -> None:
    """Draw a text at a random position in a box, smaller than `size` if it would not fit."""
    left, top, right, bottom = box
    name = rng.choice((SANS, SANS, BOLD, SERIF, MONO))
    width = canvas.measure(text, name, size)
    if width > right - left - 4:
        size *= (right - left - 4) / width
        width = canvas.measure(text, name, size)
    x = rng.uniform(left + 2, max(right - 2 - width, left + 2))
    y = rng.uniform(top + 1, max(bottom - 1 - _LINE_HEIGHT * size, top + 1))
    canvas.text(x, y, text, TextStyle(name, size, ink_on(rng, canvas.background)))


def reading_picture(rng: random.Random, group: int, noun: str) -> Content:
    """Draw a picture of numbers or words (`noun` is "number" or "word") in one of four forms."""
    form = rng.choices((_single, _listing, _labelled, _cells), (48, 20, 14, 18))[0]
    return form(rng, group, noun)


def _single(rng: random.Random, group: int, noun: str) -> Content:
    """Draw one text."""
    canvas = sheet(rng, group, ((1, 1), (2, 1), (1, 2)), (78, 11, 11))
    text = _distinct_texts(rng, noun, group, 1)[0]
    size = rng.uniform(*rng.choices(_SIZES, (46, 27, 27))[0])
    if canvas.columns * canvas.rows > 1:
        size = max(size, 22)
    put_text(canvas, rng, text, size, (0, 0, canvas.width, canvas.height))
    question = rng.choice((f"Which {noun} is shown?", f"Which {noun} is this?", f"Read the {noun}."))
    return Content(noun, canvas, [Question(question, text, "read"), look_question(rng, noun)])


def _draw_list(rng: random.Random, canvas: Canvas, texts: list[str]) -> None:
    """Draw texts below each other, in a size, line pitch and position at which they fit."""
    name = rng.choice((SANS, SANS, BOLD, SERIF, MONO))
    room = canvas.height / len(texts)
    size = min(rng.uniform(13, 17), room / _LINE_HEIGHT) * min(canvas.columns, canvas.rows) ** 0.75
    widest = max(canvas.measure(text, name, size) for text in texts)
    size *= min(1.0, (canvas.width - 8) / widest)
    pitch = rng.uniform(min(_LINE_HEIGHT * size, room), room)
    left = rng.uniform(3, max(canvas.width - 4 - widest, 3))
    top = rng.uniform(0, canvas.height - pitch * len(texts))
    style = TextStyle(name, size, ink_on(rng, canvas.background))
    for i, text in enumerate(texts):
        canvas.text(left, top + i * pitch, text, style)


def _listing(rng: random.Random, group: int, noun: str) -> Content:
    """Draw two to four texts below each other; the questions ask by position."""
    canvas = sheet(rng, group, ((1, 1), (2, 2)), (75, 25))
    texts = _distinct_texts(rng, noun, group, rng.randint(2, 4))
    _draw_list(rng, canvas, texts)
    questions = [
        Question(rng.choice((f"Which {noun} is {ordinal}?", f"Read the {ordinal} {noun}.")), text, "read")
        for ordinal, text in zip(_ORDINALS, texts, strict=False)
    ]
    rng.shuffle(questions)
    return Content(noun, canvas, questions)


def _labelled(rng: random.Random, group: int, noun: str) -> Content:
    """Draw two to four texts below each other, each after a letter; the questions ask by letter."""
    canvas = sheet(rng, group, ((1, 1), (2, 2)), (75, 25))
    texts = _distinct_texts(rng, noun, group, rng.randint(2, 4))
    labels = rng.sample(_LETTERS, len(texts))
    _draw_list(rng, canvas, [f"{label} {text}" for label, text in zip(labels, texts, strict=True)])
    questions = [
        Question(
            rng.choice((f"Which {noun} is next to {label}?", f"Read the {noun} after {label}.")), text, "read"
        )
        for label, text in zip(labels, texts, strict=True)
    ]
    return Content(noun, canvas, questions)


def _cells(rng: random.Random, group: int, noun: str) -> Content:
    """Draw one text, one photograph or nothing per tile, so that only some tiles matter to a question."""
    canvas = sheet(rng, group, ((2, 1), (1, 2), (2, 2)), (25, 25, 50))
    positions = _POSITIONS[canvas.columns, canvas.rows]
    num_texts = rng.randint(1, len(positions) - 1)
    texts = _distinct_texts(rng, noun, group, num_texts) + [""] * (len(positions) - num_texts)
    rng.shuffle(texts)
    questions = []
    for i, (position, text) in enumerate(zip(positions, texts, strict=True)):
        column, row = i % canvas.columns, i // canvas.columns
        box = (TILE * column, TILE * row, TILE * column + TILE, TILE * row + TILE)
        if text:
            put_text(canvas, rng, text, rng.uniform(*rng.choices(_SIZES, (60, 25, 15))[0]), box)
            questions.append(Question(f"Which {noun} is {position}?", text, "read"))
        elif group in sources.photo_groups():
            canvas.photograph(photograph_crop(rng, group, 1.0), *box)
    if num_texts == 1:
        questions = [Question(f"Which {noun} is shown?", questions[0].answer, "read"), *questions]
    else:
        rng.shuffle(questions)
    return Content(noun, canvas, questions)


def text_question(rng: random.Random, group: int) -> Question:
    """Draw the question of a row without a picture: repeat or pick a word, compare or repeat numbers."""
    words = rng.sample(LEXICON, 3)
    first, second = rng.sample(sources.group_numbers(group), 2)
    form = rng.randrange(4)
    if form == 0:
        return Question(f"Repeat the word {words[0]}.", words[0], "text")
    if form == 1:
        return Question(f"Which number is larger, {first} or {second}?", str(max(first, second)), "text")
    if form == 2:
        index = rng.randrange(3)
        ordinal = _ORDINALS[index]
        return Question(f"Which word is {ordinal}: {words[0]}, {words[1]}, {words[2]}?", words[index], "text")
    return Question(f"Repeat the numbers {first} and {second}.", f"{first} and {second}", "text")
