"""The turns of a row in any of the forms that people write, as InternVL's turns of {from, value}.

A turn list is in `conversations`, `messages`, `conversation` or `texts`, possibly as JSON text; or there is
one question with its answer. A turn may name its pictures itself, in parts of its content or in a field.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.records.forms.embedded import Attachment, type_name
from data_prep.records.forms.named_pictures import PICTURE_FIELDS, picture_list
from data_prep.records.forms.parts import content_of_turn, joined_parts
from data_prep.records.forms.unread import (
    LEARNED_FIELDS,
    TOOL_SPEAKERS,
    plain_name,
    refuse_unread_of_turn,
)
from data_prep.records.forms.values import as_text, fields_given, filled, is_given, json_value
from data_prep.records.rejection import Rejected, shown
from vico.special_tokens import IMAGE_MARK

TURN_FIELDS = ("conversations", "messages", "conversation", "texts")
PAIR_FIELDS = (
    ("query", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "response"),
)
# what a question may need to make sense; conversations have it in their turns
_BESIDE_A_QUESTION = re.compile(
    r"input|(answer)?(options|choices)(list)?|(option|choice)s?([a-h]|\d+)|contexts?|passages?|hints?"
)
_LETTERS_OF_OPTIONS = ("a", "b", "c", "d", "e", "f", "g", "h")
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_SPEAKER_FIELDS, _VALUE_FIELDS = ("from", "role", "speaker"), ("value", "content", "text")
_ASKED, _ANSWERED = ("user", "human", "question", "query"), ("assistant", "gpt", "answer", "response")


@dataclass
class Turns:
    """Turns of {from, value[, loss]} and the fields of the row that they come from.

    `marks` has for each mark of a picture the picture, or its place in the row's list, that the turn itself
    gives, or None. `marks_first`: the form has no place for marks, so pictures go before the first question.
    """

    fields: tuple[str, ...] = ()
    turns: list[Any] = field(default_factory=list)
    marks: list[Attachment | str | int | None] = field(default_factory=list)
    marks_first: bool = False


def turns_of_row(row: dict[str, Any]) -> Turns | None:
    """Return the turns of a row, or None when no field holds any.

    Raises Rejected when two fields hold different turns, or a turn has something that is not read.
    """
    given = [(name, _turns_of_field(row, name)) for name in filled(row, TURN_FIELDS)]
    if not given:
        return _turns_of_pair(row)
    first_name, first = given[0]
    for name, other in given[1:]:
        if other.turns != first.turns:
            raise Rejected("broken_row", f"{first_name} and {name} hold different turns; keep one of them")
    return replace(first, fields=tuple(name for name, _ in given))


def turns_of_caption(caption: str) -> Turns:
    """Return the turns of a caption: a question of marks alone, answered by the caption."""
    return _turns_of_pairs([("", caption)])


def _turns_of_field(row: dict[str, Any], name: str) -> Turns:
    value = json_value(row[name])
    if isinstance(value, dict):
        value = _transposed(value, name)
    if not isinstance(value, list):
        raise Rejected("broken_row", f"{name} is not a list of turns")
    if _are_speakers_and_texts(value):
        value = [{"from": speaker, "value": text} for speaker, text in value]
    elif all(_is_pair(element) for element in value):
        return _turns_of_pairs(value)
    turns, is_spelled = Turns(), any(_asks_in_spelled_parts(turn) for turn in value)
    for number, turn in enumerate(value):
        _add_turn(turns, turn, number, is_spelled)
    return turns


def _asks_in_spelled_parts(turn: Any) -> bool:
    """Return whether the turn is no answer, and its content is parts that a text spells as JSON."""
    if not isinstance(turn, dict):
        return False
    speakers = {_speaker(turn[name]) for name in _SPEAKER_FIELDS if isinstance(turn.get(name), str)}
    texts = (turn[name] for name in _VALUE_FIELDS if isinstance(turn.get(name), str))
    return "gpt" not in speakers and any(content_of_turn(text) is not text for text in texts)


def _transposed(lists: dict[str, Any], field: str) -> Any:
    """Return the turns of {"from": [..], "value": [..]}, as some libraries write a list of structs.

    Raises Rejected when a value is beside the lists: it might change what is learned.
    """
    columns = {name: column for name, column in lists.items() if isinstance(column, list)}
    if not columns or len({len(column) for column in columns.values()}) > 1:
        return lists
    for name, value in lists.items():
        if name not in columns and value is not None:
            message = f"{field} has {shown(name)} beside lists of turns, which is not read; give it per turn"
            raise Rejected("unread_field", message)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _add_turn(turns: Turns, turn: Any, number: int, is_spelled: bool = False) -> None:
    """Add a turn. If the questions of a row spell their parts as JSON (`is_spelled`), so may its answers;
    otherwise an answer that looks like parts is the text to learn."""
    if not isinstance(turn, dict):
        turns.turns.append(turn)
        return
    refuse_unread_of_turn(turn, number)
    speaker = _only([_speaker(turn[name]) for name in _SPEAKER_FIELDS if turn.get(name)], "speakers", number)
    value = _only([turn[name] for name in _VALUE_FIELDS if turn.get(name) is not None], "texts", number)
    if speaker != "gpt" or is_spelled:
        value = content_of_turn(value)
    marks: list[Attachment | str | int | None]
    if isinstance(value, list):
        value, marks = joined_parts(value, f"turn {number}", speaker == "gpt")
    else:
        marks = [None] * value.count(IMAGE_MARK) if isinstance(value, str) else []
    names = [name for field in PICTURE_FIELDS for name in picture_list(turn.get(field), field)]
    if names and isinstance(value, str):
        if not marks:
            value, marks = f"{IMAGE_MARK}\n" * len(names) + value, [None] * len(names)
        if len(marks) != len(names) or any(mark is not None for mark in marks):
            raise Rejected("image_count", f"turn {number}: {len(marks)} marks for {len(names)} pictures")
        marks = list(names)
    if speaker == "gpt" and any(mark is not None for mark in marks):
        raise Rejected("unread_field", f"turn {number} is an answer with a picture; answers are text")
    turns.turns.append({"from": speaker, "value": value, **_learned(turn, speaker, number)})
    if speaker != "gpt":
        turns.marks += marks


def _speaker(name: Any) -> Any:
    return _SPEAKERS.get(name.lower(), name) if isinstance(name, str) else name


def _only(values: list[Any], what: str, number: int) -> Any:
    """Return the value that several fields of a turn agree on, None if there is none."""
    if any(value != values[0] for value in values):
        raise Rejected(
            "broken_row", f"turn {number} has different {what} in several fields; keep one of them"
        )
    return values[0] if values else None


def _learned(turn: dict[str, Any], speaker: Any, number: int) -> dict[str, bool]:
    """Return {"loss": False} for an answer that stays in the prompt and is not learned, {} for all others.

    Raises Rejected for a value other than true, false, 1 and 0, and when two fields disagree.
    """
    given = {name: turn[name] for name in LEARNED_FIELDS if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            message = f"turn {number} has {name}={shown(str(value))}; only true, false, 1 and 0 are read"
            raise Rejected("unread_field", message)
    if speaker != "gpt":
        if given.get("train"):
            raise Rejected("unread_field", f"turn {number} has train=true; only answers are learned")
        return {}
    if len({bool(value) for value in given.values()}) > 1:
        raise Rejected("broken_row", f"turn {number}: {' and '.join(given)} disagree")
    return {"loss": False} if given and not any(given.values()) else {}


def _are_speakers_and_texts(elements: list[Any]) -> bool:
    """Return whether the elements are turns such as ["user", "Hello"], and not questions with answers."""
    return bool(elements) and all(
        isinstance(element, list)
        and _is_pair(element)
        and (element[0].lower() in _SPEAKERS or element[0].lower() in TOOL_SPEAKERS)
        for element in elements
    )


def _is_pair(element: Any) -> bool:
    if isinstance(element, list):
        return len(element) == 2 and all(isinstance(text, str) for text in element)
    return (
        isinstance(element, dict)
        and bool(fields_given(element, _ASKED) or fields_given(element, _ANSWERED))
        and not (filled(element, _SPEAKER_FIELDS))
    )


def _turns_of_pairs(pairs: Sequence[Any]) -> Turns:
    turns = Turns(marks_first=True)
    for pair in pairs:
        number = len(turns.turns)
        question, answer = _of_fields(pair, number) if isinstance(pair, dict) else pair
        learned = {}
        if isinstance(pair, dict):
            learned = {name: pair[name] for name in LEARNED_FIELDS if name in pair}
        _add_turn(turns, {"from": "human", "value": question}, number)
        _add_turn(turns, {"from": "gpt", "value": answer, **learned}, number + 1)
    return turns


def _of_fields(pair: dict[str, Any], number: int) -> tuple[Any, Any]:
    """Return question and answer of a pair with names. Raises Rejected for what it has besides and is not
    read."""
    asked, answered = fields_given(pair, _ASKED), fields_given(pair, _ANSWERED)
    question, answer = (
        _only([pair[name] for name in names], "questions or answers", number) for names in (asked, answered)
    )
    rest = {name: value for name, value in pair.items() if name not in (*_ASKED, *_ANSWERED)}
    for name in (*filled(rest, ("system", *PICTURE_FIELDS)), *_beside_a_question(rest)):
        message = (
            f"turn {number} has {name} beside a question, which is not read; use turns of from and value"
        )
        raise Rejected("unread_field", message)
    refuse_unread_of_turn(rest, number)
    return question, answer


def _turns_of_pair(row: dict[str, Any]) -> Turns | None:
    """Return the turns of one question and its answer, after those of `history`, if there are any."""
    pairs = [pair for pair in PAIR_FIELDS if all(is_given(row.get(name)) for name in pair)]
    if not pairs:
        return None
    asked, answered = pairs[0]
    for other in pairs[1:]:
        if (row[other[0]], row[other[1]]) != (row[asked], row[answered]):
            names = ", ".join(dict.fromkeys((asked, answered, *other)))
            raise Rejected("broken_row", f"{names} hold different questions or answers; keep one of each")
    fields = tuple(dict.fromkeys(name for pair in pairs for name in pair))
    question, answer = json_value(row[asked]), json_value(row[answered])
    if _are_turns(question) and _are_turns(answer):  # TRL's prompt and completion
        return replace(_turns_of_field({"turns": [*question, *answer]}, "turns"), fields=fields)
    history = json_value(row.get("history")) or []
    if not isinstance(history, list) or not all(map(_is_pair, history)) or _are_speakers_and_texts(history):
        raise Rejected("broken_row", "history is not a list of [question, answer]")
    for name in _beside_a_question(row):
        if (asked, name) != ("instruction", "input"):
            message = f"{shown(name)} is not read beside {asked}; put it into the text of {asked}"
            raise Rejected("unread_field", message)
    text = "\n".join(_pair_text(part) for part in _question_texts(row, asked))
    turns = _turns_of_pairs([*history, (text, _pair_text(row[answered]))])
    return replace(turns, fields=(*fields, "history", "input"))


def _are_turns(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and filled(turn, _SPEAKER_FIELDS) for turn in value)
    )


def _beside_a_question(fields: dict[str, Any]) -> list[str]:
    """Return the fields that a question may need, such as its options: by name, or as columns A, B, C .."""
    given = [name for name, value in fields.items() if is_given(value)]
    letters = [name for name in given if name.lower() in _LETTERS_OF_OPTIONS]
    named = [name for name in given if _BESIDE_A_QUESTION.fullmatch(plain_name(name))]
    return named + (letters if len(letters) > 1 else [])


def _question_texts(row: dict[str, Any], asked: str) -> Iterator[Any]:
    yield row[asked]
    if asked == "instruction" and is_given(row.get("input")):
        yield row["input"]  # as in Alpaca's rows


def _pair_text(value: Any) -> str:
    """Return a question or an answer as text; answers such as a count may be numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not isinstance(value, str):
        raise Rejected("broken_row", f"a question or an answer is {type_name(value)}; it must be text")
    return as_text(value)
