"""The built-in demo records: real pictures and text from installed packages, a function of (seed, line).

They are read like any other records. `examples/small_internvl` trains the small model on them, and
`data_prep/demo/mix.py` counts what their tiles show.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.demo import sources
from data_prep.demo.charts import chart_picture
from data_prep.demo.content import Content, Question
from data_prep.demo.pages import code_picture, figure_picture, prose_picture
from data_prep.demo.photographs import caption_picture, photograph_picture, plain_picture
from data_prep.demo.reading import reading_picture, text_question

DEMO_VERSION = 4
"""Increased when the same (seed, line) gives another record."""
_DRAWS = 3
"""Seeds the draws of every record; those of version 4 differ only where a line of code would be blank."""
KIND_SHARES: dict[str, float] = {
    "number": 0.22,
    "word": 0.17,
    "chart": 0.13,
    "prose": 0.07,
    "code": 0.04,
    "photograph": 0.13,
    "plain": 0.11,
    "caption": 0.06,
    "figure": 0.05,
    "text": 0.02,
}
"""Share of the records with each kind of content."""
_PHOTO_KINDS = ("photograph", "caption", "figure")  # drawn from groups that have a photograph
_LOOK_SHARE = 0.12  # how often the main question about a picture with text needs no reading
_TURNS = {1: 0.3, 2: 0.3, 3: 0.25, 4: 0.15}  # number of questions of a record, if there are so many -> share
_PICTURES: dict[str, Callable[[random.Random, int], Content]] = {
    "chart": chart_picture,
    "prose": prose_picture,
    "code": code_picture,
    "photograph": photograph_picture,
    "plain": plain_picture,
    "caption": caption_picture,
    "figure": figure_picture,
}


def record_random(seed: int, line: int) -> random.Random:
    """Return the random generator of one record; a string as seed is the same on every platform."""
    return random.Random(f"demo {_DRAWS} {seed} {line}")


def drawn_group(rng: random.Random, kind: str) -> int:
    """Draw the group of a record, which its pictures and questions take their material from."""
    if kind in _PHOTO_KINDS or (kind in ("number", "word") and rng.random() < 0.3):
        return rng.choice(sources.photo_groups())
    return rng.randrange(sources.NUM_GROUPS)


def group_name(group: int) -> str:
    return f"demo-{group:02d}"


def demo_content(rng: random.Random, kind: str, group: int) -> Content:
    """Draw the picture of a record of a kind, not encoded, with all its questions."""
    if kind in ("number", "word"):
        return reading_picture(rng, group, kind)
    return _PICTURES[kind](rng, group)


def asked_questions(rng: random.Random, content: Content) -> list[Question]:
    """Draw the questions of a record about its picture; the last one decides its `task`.

    Several questions need several tiles, so the loss of a record says what each of its tiles is worth, and
    not only the tile that a single question asks about. At most one question is a transcription.
    """
    look = [question for question in content.questions if question.task == "look"]
    other = [question for question in content.questions if question.task != "look"]
    if content.kind == "figure":
        rng.shuffle(other)
    main = (look if look and (not other or rng.random() < _LOOK_SHARE) else other)[0]
    asked, rest = [main], [question for question in content.questions if question is not main]
    rng.shuffle(rest)
    num_turns = rng.choices(list(_TURNS), list(_TURNS.values()))[0]
    for question in rest:
        num_transcriptions = sum(turn.task == "transcribe" for turn in (*asked, question))
        is_new = question.text not in {turn.text for turn in asked}
        if len(asked) < num_turns and num_transcriptions < 2 and is_new:
            asked.insert(0, question)
    return asked


def conversation(questions: list[Question], has_picture: bool) -> list[dict[str, str]]:
    """Return the turns of a record in InternVL's form, with the picture before the first question."""
    turns: list[dict[str, str]] = []
    for i, question in enumerate(questions):
        mark = "<image>\n" if has_picture and i == 0 else ""
        turns += [{"from": "human", "value": mark + question.text}, {"from": "gpt", "value": question.answer}]
    return turns


@dataclass(frozen=True)
class DrawnRecord:
    """A record before its picture is encoded; `content` is None for a row without a picture."""

    kind: str
    group: int
    content: Content | None
    questions: list[Question]


def drawn_record(seed: int, line: int) -> DrawnRecord:
    """Draw record `line` of a seed; `demo_record` returns it as a row with the bytes of its picture."""
    rng = record_random(seed, line)
    kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    group = drawn_group(rng, kind)
    if kind == "text":
        return DrawnRecord(kind, group, None, [text_question(rng, group)])
    content = demo_content(rng, kind, group)
    return DrawnRecord(kind, group, content, asked_questions(rng, content))


def demo_record(seed: int, line: int) -> tuple[dict[str, Any], list[bytes]]:
    """Return record `line` of a seed as an InternVL row and the bytes of its pictures (none or one).

    The row has `id`, `conversations`, `kind` (of content), `group` (for the split), `task` (of the last
    question: read, transcribe, look or text) and, with a picture, `image`, `width` and `height`.
    """
    drawn = drawn_record(seed, line)
    row: dict[str, Any] = {"id": f"demo-{line:06d}"}
    pictures = []
    if drawn.content is not None:
        canvas, format_name = drawn.content.canvas, drawn.content.format_name
        pictures.append(canvas.encoded(format_name))
        row["image"] = f"{row['id']}.{'jpg' if format_name == 'JPEG' else 'png'}"
        row["width"], row["height"] = canvas.image.size
    row["conversations"] = conversation(drawn.questions, bool(pictures))
    row.update(kind=drawn.kind, group=group_name(drawn.group), task=drawn.questions[-1].task)
    return row, pictures
