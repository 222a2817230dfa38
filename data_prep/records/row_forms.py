"""The normal form of a row: `conversations` of {from, value}, `image` as a list of pictures.

Rows of every format pass `normal_row`, which looks at values: it finds turns, speakers, pictures and the
system message in the forms that people write, and rejects a row with something that is not read. A row in
normal form stays as it is.
"""

from collections.abc import Mapping
from typing import Any

from data_prep.records.forms.embedded import Attachment, Embedded, type_name
from data_prep.records.forms.named_pictures import PICTURE_FIELDS, listed_pictures, paths_beside_bytes
from data_prep.records.forms.turns import TURN_FIELDS, Turns, turns_of_caption, turns_of_row
from data_prep.records.forms.unread import refuse_unread
from data_prep.records.forms.values import filled
from data_prep.records.raw_rows import RawRow, parsed_row
from data_prep.records.rejection import Rejected
from vico.special_tokens import IMAGE_MARK

_SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "system_instruction")
_REPLACED_FIELDS = frozenset((*PICTURE_FIELDS, *TURN_FIELDS, *_SYSTEM_FIELDS))
# fields of a row in InternVL's form; one with others is looked at value by value
_PLAIN_FIELDS = frozenset(
    [
        "id",
        "image",
        "conversations",
        "width",
        "height",
        "length",
        "kind",
        "category",
        "group",
        "license",
        "source",
        "origin",
    ]
)
_PLAIN_TURN = frozenset(("from", "value"))
_PLAIN_SPEAKERS = frozenset(("human", "gpt", "system"))
# how a text may start that spells the parts of a turn as JSON
_BEFORE_PARTS = frozenset("[ \t\r\n")


def normal_form(raw: RawRow, *, mark_first: bool = False) -> dict[str, Any]:
    """Return the fields of a raw row in normal form. Raises Rejected as its reader and `normal_row` do."""
    if raw.refused is not None:
        raise Rejected(*raw.refused)
    return normal_row(parsed_row(raw.content), embedded=raw.embedded, mark_first=mark_first)


def normal_row(
    row: dict[str, Any], *, embedded: Embedded | None = None, mark_first: bool = False
) -> dict[str, Any]:
    """Return the row in normal form; fields that are not read are kept.

    A row that names no pictures has those of `embedded`. With `mark_first` a row with one picture and no mark
    gets its mark before the first question, as in InternVL's reader. Raises Rejected for a row that holds
    something that is not read, or whose fields contradict each other.
    """
    normal = row if embedded is None and _is_plain(row) else _converted(row, embedded)
    names = normal.get("image") or []
    if mark_first and (isinstance(names, str) or len(names) == 1):
        turns = normal["conversations"]
        if not any(_marks(turn) for turn in turns):
            normal = {**normal, "conversations": _with_marks_first(turns, 1)}
    return normal


def _is_plain(row: dict[str, Any]) -> bool:
    """Return whether a row is in normal form and has no other fields; written for speed, as most rows are."""
    if not row.keys() <= _PLAIN_FIELDS:
        return False
    names, turns = row.get("image"), row.get("conversations")
    if type(names) is list:
        for name in names:
            if type(name) is not str or not name:
                return False
    elif names is not None and type(names) is not str:
        return False
    if type(turns) is not list:
        return False
    for turn in turns:
        if type(turn) is not dict or turn.keys() != _PLAIN_TURN or type(turn["value"]) is not str:
            return False
        if type(turn["from"]) is not str or turn["from"] not in _PLAIN_SPEAKERS:
            return False
        if turn["value"][:1] in _BEFORE_PARTS:
            return False
    return True


def _converted(row: dict[str, Any], embedded: Embedded | None) -> dict[str, Any]:
    listed = listed_pictures(row)
    turns = turns_of_row(row)
    if turns is None and embedded is not None and embedded.caption is not None:
        turns = turns_of_caption(embedded.caption_text())
    if turns is None:
        refuse_unread(row, _REPLACED_FIELDS, listed)
        raise Rejected(
            "broken_row",
            "no field holds turns: conversations, messages or texts, or a question and its answer",
        )
    pictures, names = _pictures(row, listed, turns, embedded)
    replaced = _REPLACED_FIELDS.union(turns.fields)
    refuse_unread(row, replaced, [*pictures, *names])
    conversations = turns.turns
    if turns.marks_first and pictures and not turns.marks:
        conversations = _with_marks_first(conversations, len(pictures))
    return {
        **{name: value for name, value in row.items() if name not in replaced},
        "conversations": _with_system(row, conversations),
        "image": pictures,
    }


def _pictures(
    row: Mapping[str, Any], listed: list[str | Attachment], turns: Turns, embedded: Embedded | None
) -> tuple[list[str | Attachment], list[str]]:
    """Return the row's pictures in the order of the marks, and the other names that the row has for them."""
    names = [path for path, _ in paths_beside_bytes({name: row.get(name) for name in PICTURE_FIELDS})]
    if embedded is None:
        return _pictures_in_order(listed, turns), names
    has_names = listed or any(isinstance(mark, str | Attachment) for mark in turns.marks)
    if has_names:
        named = _pictures_in_order(listed, turns)
        return embedded.named_pictures(named), [*names, *map(str, named)]
    leaves_out = embedded.is_repaired and row.get("image", row.get("images")) == []
    return _pictures_in_order([] if leaves_out else embedded.all_pictures(), turns), names


def _pictures_in_order(listed: list[str | Attachment], turns: Turns) -> list[str | Attachment]:
    """Return the row's pictures in the order of the marks.

    Parts of turns name all of them or none; their `index` is a place in the row's own list.
    """
    marks = turns.marks
    if all(mark is None for mark in marks):
        return listed
    if any(mark is None for mark in marks):
        raise Rejected("image_count", "some marks of pictures name their picture and others do not")
    if any(isinstance(mark, int) and not 0 <= mark < len(listed) for mark in marks):
        raise Rejected("image_count", f"the index of a picture is not in images, which has {len(listed)}")
    names = [listed[mark] if isinstance(mark, int) else mark for mark in marks if mark is not None]
    if listed and set(listed) != set(names):
        raise Rejected("broken_row", "image or images and the parts of turns name different pictures")
    return names


def _marks(turn: dict[str, Any]) -> int:
    value = turn.get("value") if isinstance(turn, dict) else None
    return value.count(IMAGE_MARK) if isinstance(value, str) and turn.get("from") != "gpt" else 0


def _with_marks_first(turns: list[Any], num_marks: int) -> list[Any]:
    for n, turn in enumerate(turns):
        if isinstance(turn, dict) and turn.get("from") == "human" and isinstance(turn["value"], str):
            marks = "\n".join([IMAGE_MARK] * num_marks)
            first = {**turn, "value": f"{marks}\n{turn['value']}" if turn["value"] else marks}
            return [*turns[:n], first, *turns[n + 1 :]]
    return turns


def _with_system(row: dict[str, Any], turns: list[Any]) -> list[Any]:
    """Return the turns after the row's system message, if it has one."""
    messages = {name: row[name] for name in filled(row, _SYSTEM_FIELDS)}
    for name, message in messages.items():
        if not isinstance(message, str):
            raise Rejected("broken_row", f"{name} is {type_name(message)}; it must be text")
    has_own = bool(turns) and isinstance(turns[0], dict) and turns[0].get("from") == "system"
    texts = [*messages.values(), *([turns[0].get("value")] if has_own else [])]
    if any(text != texts[0] for text in texts):
        held_in = [*messages, *(["the first turn"] if has_own else [])]
        raise Rejected(
            "broken_row", f"{' and '.join(held_in)} hold different system messages; keep one of them"
        )
    if not messages or has_own:
        return turns
    return [{"from": "system", "value": next(iter(messages.values()))}, *turns]
