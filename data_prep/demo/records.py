"""The built-in demo records: real pictures and text from installed packages, by (seed, line) alone.

Read like any other source of records; `examples/small_internvl` trains the small model on them and
`data_prep/demo/mix.py` counts what their tiles show.
"""

import random
from dataclasses import dataclass

from data_prep.demo import sources
from data_prep.demo.charts import chart_picture, figure_picture
from data_prep.demo.content import Content, Question
from data_prep.demo.photographs import caption_picture, photograph_picture, plain_picture
from data_prep.demo.reading import code_picture, prose_picture, reading_picture, text_question

DEMO_VERSION = 3  # moves when the same (seed, line) gives another record
# Kind of content -> share of the records.
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
_PHOTO_KINDS = ("photograph", "caption", "figure")  # drawn from groups that own a photograph
_LOOK_SHARE = 0.12  # of pictures that can be read: how often the question is one that needs no reading
_TURNS = {1: 0.3, 2: 0.3, 3: 0.25, 4: 0.15}  # questions of a record, where the picture has so many


def num_records(config) -> int:
    """Number of demo records; `config.num_samples`."""
    return config.num_samples


def record_random(seed: int, line: int) -> random.Random:
    """The random numbers of one record; seeding with a string is the same on every platform."""
    return random.Random(f"demo {DEMO_VERSION} {seed} {line}")


def drawn_group(rng: random.Random, kind: str) -> int:
    """The group of a record: what its pictures and questions draw from."""
    if kind in _PHOTO_KINDS or (kind in ("number", "word") and rng.random() < 0.3):
        return rng.choice(sources.photo_groups())
    return rng.randrange(sources.NUM_GROUPS)


def group_name(group: int) -> str:
    return f"demo-{group:02d}"


def demo_content(rng: random.Random, kind: str, group: int) -> Content:
    """The picture of a record of a kind, drawn but not encoded, with all its questions."""
    if kind in ("number", "word"):
        return reading_picture(rng, group, kind)
    makers = {
        "chart": chart_picture,
        "prose": prose_picture,
        "code": code_picture,
        "photograph": photograph_picture,
        "plain": plain_picture,
        "caption": caption_picture,
        "figure": figure_picture,
    }
    return makers[kind](rng, group)


def asked_questions(rng: random.Random, content: Content) -> list[Question]:
    """The questions a record asks about its picture, the one that its `task` names last.

    Several questions reach several tiles, so the loss of a record says what each of its tiles is worth, not
    only the one tile that a single question happens to ask for. At most one of them is a transcription.
    """
    look = [question for question in content.questions if question.task == "look"]
    other = [question for question in content.questions if question.task != "look"]
    if content.kind == "figure":
        rng.shuffle(other)
    pool = look if look and (not other or rng.random() < _LOOK_SHARE) else other
    asked, rest = [pool[0]], [question for question in content.questions if question is not pool[0]]
    rng.shuffle(rest)
    num_turns = rng.choices(list(_TURNS), list(_TURNS.values()))[0]
    for question in rest:
        lines = sum(one.task == "transcribe" for one in (*asked, question))
        if len(asked) < num_turns and lines < 2 and question.text not in {one.text for one in asked}:
            asked.insert(0, question)
    return asked


def conversation(questions: list[Question], has_picture: bool) -> list[dict[str, str]]:
    """The turns of a record in InternVL's form, the picture before the first question."""
    turns = []
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
    """Record `line` of a seed as drawn; `demo_record` gives it as a row with bytes."""
    rng = record_random(seed, line)
    kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    group = drawn_group(rng, kind)
    if kind == "text":
        return DrawnRecord(kind, group, None, [text_question(rng, group)])
    content = demo_content(rng, kind, group)
    return DrawnRecord(kind, group, content, asked_questions(rng, content))


def demo_record(config, line: int) -> tuple[dict, list[bytes]]:
    """Record `line` as an InternVL row and the bytes of its pictures; depends on `config.seed` and line only.

    The row has `id`, `conversations`, `kind` (of content), `group` (for the split), `task` (read, transcribe,
    look or text: that of the last question) and, with a picture, `image`, `width`, `height`.
    """
    drawn = drawn_record(config.seed, line)
    row: dict = {"id": f"demo-{line:06d}"}
    pictures = []
    if drawn.content is not None:
        canvas, format_name = drawn.content.canvas, drawn.content.format_name
        pictures.append(canvas.encoded(format_name))
        row["image"] = f"{row['id']}.{'jpg' if format_name == 'JPEG' else 'png'}"
        row["width"], row["height"] = canvas.image.size
    row["conversations"] = conversation(drawn.questions, bool(pictures))
    row.update(kind=drawn.kind, group=group_name(drawn.group), task=drawn.questions[-1].task)
    return row, pictures
