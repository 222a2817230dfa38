"""Checks that turn a raw row into a sample: the form of the row, its pictures, its tiles, its tokens.

A check that fails raises Rejected with one word of `data_prep/records/rejection.py`.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep.records.forms.boxes import has_places, with_objects
from data_prep.records.forms.values import as_text
from data_prep.records.pictures import Picture, checked_picture
from data_prep.records.raw_rows import RawRow, picture_data, picture_names, record_id
from data_prep.records.rejection import Rejected, shown
from data_prep.records.row_forms import normal_form
from vico.prompt import PromptFormat
from vico.special_tokens import IMAGE_MARK
from vico.tiling import num_tiles
from vico.turn_tokenizer import SpelledToken

_MEDIA_MARK = re.compile(r"^[^\S\n]*<(audio|video)>", re.MULTILINE | re.IGNORECASE)
_READ_FIELDS = (
    "id",
    "conversations",
    "image",
    "video",
    "videos",
    "audio",
    "audios",
    "kind",
    "category",
    "group",
    "license",
    "origin",
)
# fields that we write to KEY.json ourselves, or compute from the pictures
_REPLACED_FIELDS = ("source", "line", "images", "repeat", "max_tiles", "width", "height", "length")
_SKIPPED_FIELDS = frozenset((*_READ_FIELDS, *_REPLACED_FIELDS))
_MAX_FIELD_CHARS = 200


@dataclass(frozen=True)
class RowRules:
    """The limits of a row: tiles, pixels per picture, reference tokens.

    `decode`: whether pictures are decoded in full. `system_message` goes before conversations without one;
    "" adds none. `mark_first`: one picture without a mark is shown before the first question.
    """

    max_tiles: int
    max_pixels: int
    max_tokens: int
    decode: bool
    system_message: str = ""
    mark_first: bool = False


class Sample(NamedTuple):
    """A checked row. An answer with `"loss": False` is not learned.

    `tiles` has the number of each picture's tiles, thumbnail included; its grid has at most `max_tiles`.

    `license` and `origin` (the collection it came from: the row's `origin` or `source`) are empty if the row
    states none.
    """

    record_id: str | None
    conversations: list[dict[str, Any]]
    pictures: list[Picture]
    kind: str
    group: str
    license: str
    origin: str
    fields: dict[str, Any]
    max_tiles: int
    tiles: list[int]
    text_tokens: int
    answer_tokens: int


def checked_sample(raw: RawRow, rules: RowRules, prompt_format: PromptFormat) -> Sample:
    """Return the sample of a raw row. Raises Rejected from the first check that fails, cheap checks first."""
    row = normal_form(raw, mark_first=rules.mark_first)
    conversations = _conversations(row)
    names = picture_names(row)
    _check_answers(conversations)
    _check_marks(conversations, len(names))
    if rules.system_message and conversations[0]["from"] != "system":
        conversations.insert(0, {"from": "system", "value": rules.system_message})
    if raw.is_duplicate:
        raise Rejected("duplicate", "the same line appears earlier in this set")
    pictures = [
        checked_picture(picture_data(raw, name), str(name), max_pixels=rules.max_pixels, decode=rules.decode)
        for name in names
    ]
    if has_places(conversations):
        sizes = [(picture.width, picture.height) for picture in pictures]
        conversations = with_objects(conversations, row.get("objects"), sizes)
    settings = prompt_format.settings
    tiling = settings.tiling(max(1, rules.max_tiles // max(1, len(pictures))))  # divided as in InternVL
    tiles = [num_tiles(picture.width, picture.height, tiling) for picture in pictures]
    try:
        text_tokens, answer_tokens = prompt_format.num_tokens(conversations, tiles)
    except SpelledToken as error:
        raise Rejected("control_token", _spelled(error, conversations)) from error
    except ValueError as error:
        raise Rejected("broken_row", str(error)) from error
    tokens = text_tokens + sum(tiles) * settings.tokens_full
    if tokens > rules.max_tokens:
        raise Rejected("over_budget", f"{tokens} tokens ({sum(tiles)} tiles), over {rules.max_tokens}")
    return Sample(
        record_id=record_id(row),
        conversations=conversations,
        pictures=pictures,
        kind=_information(row, "kind", "category") or ("image" if pictures else "text"),
        group=_group(row.get("group")),
        license=_information(row, "license").strip(),
        origin=_information(row, "origin", "source").strip(),
        fields=_small_fields(row),
        max_tiles=tiling.max_tiles,
        tiles=tiles,
        text_tokens=text_tokens,
        answer_tokens=answer_tokens,
    )


def _conversations(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns with only `from`, `value` and `loss`; they must go [system,] human, gpt, human, .."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise Rejected("broken_row", "conversations is not a list of turns")
    speakers = []
    for turn in turns:
        is_turn = isinstance(turn, dict) and isinstance(turn.get("from"), str)
        if not is_turn or not isinstance(turn.get("value"), str):
            raise Rejected("broken_row", 'a turn is not {"from": text, "value": text}')
        speakers.append(turn["from"])
    if "gpt" not in speakers:
        raise Rejected("no_answer", "the conversation has no gpt turn")
    spoken = speakers[1:] if speakers[0] == "system" else speakers
    for n, speaker in enumerate(spoken):
        if speaker != ("human", "gpt")[n % 2]:
            message = f"turn {n} is from {shown(speaker)!r}; turns go human, gpt, human, gpt"
            raise Rejected("broken_row", message)
    if spoken[-1] != "gpt":
        raise Rejected("no_answer", "the last question has no answer")
    if all(turn.get("loss") is False for turn in turns if turn["from"] == "gpt"):
        raise Rejected("no_answer", "no answer is learned; each has a loss or weight of 0")
    return [
        {"from": turn["from"], "value": turn["value"], **({"loss": turn["loss"]} if "loss" in turn else {})}
        for turn in turns
    ]


def _spelled(error: SpelledToken, conversations: list[dict[str, Any]]) -> str:
    """Return which text of the row spells a token; turns count from 0 after the system message."""
    number = error.turn - (conversations[0]["from"] == "system")
    where = "the system message" if number < 0 else f"turn {number}"
    return f"{where}: the text spells the token {error.token}"


def _group(value: Any) -> str:
    """Return a group as text, never cut, because it decides the split.

    1.0 is the group 1: pandas writes it so in a column that lacks a value, and another source may write 1.
    """
    return as_text(int(value) if isinstance(value, float) and value.is_integer() else value)


def _information(row: dict[str, Any], *fields: str) -> str:
    """Return the first of the fields that has something, as text; no row is lost because of its form."""
    for field in fields:
        if text := as_text(row.get(field)):
            return text[:_MAX_FIELD_CHARS]
    return ""


def _check_answers(conversations: list[dict[str, str]]) -> None:
    if any(turn["from"] == "gpt" and not turn["value"].strip() for turn in conversations):
        raise Rejected("empty_answer", "an answer is empty")


def _check_marks(conversations: list[dict[str, str]], num_pictures: int) -> None:
    for number, turn in enumerate(conversations):
        # as a word in a text they mean nothing; at the start of a line of a question they stand for media
        if turn["from"] != "gpt" and "<" in turn["value"]:
            mark = _MEDIA_MARK.search(turn["value"])
            if mark:
                media = mark[1].lower()
                raise Rejected(media, f"turn {number} has the mark <{media}>; only pictures are supported")
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in conversations if turn["from"] != "gpt")
    if marks != num_pictures:
        remedy = (
            "; mark_first: true in inputs.records shows it first" if (marks, num_pictures) == (0, 1) else ""
        )
        raise Rejected("image_count", f"{marks} {IMAGE_MARK} marks for {num_pictures} pictures{remedy}")


def _small_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row's short plain fields that nothing here reads, such as a score; KEY.json keeps them."""
    if row.keys() <= _SKIPPED_FIELDS:
        return {}
    return {
        name: value
        for name, value in row.items()
        if name not in _SKIPPED_FIELDS
        and isinstance(value, str | int | float)
        and len(str(value)) <= _MAX_FIELD_CHARS
    }
