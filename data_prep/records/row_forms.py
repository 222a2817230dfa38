"""Conversion of rows to InternVL's form: `conversations` of {from, value}, `image` as a list of names."""

import json
from typing import Any

from vico.special_tokens import IMAGE_MARK

_SPEAKERS = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "system": "system"}
_CONVERTED_FIELDS = ("messages", "texts", "images", "videos")


def internvl_line(content: bytes) -> bytes:
    """Return the line of a ShareGPT row (`messages`, `images`) as the line of an InternVL row.

    A line that is not a JSON object is returned unchanged, so that the checks can name what is wrong with it.
    """
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return content
    if not isinstance(row, dict):
        return content
    return json.dumps(internvl_row(row), ensure_ascii=True).encode()


def internvl_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with `conversations` and `image` in InternVL's form; other fields are kept.

    Converts `messages` of {role, content} (content may be a list of parts), `texts` of {user, assistant} (the
    pictures come before the first question), `images` and `videos`. Values of another form are kept for the
    checks to reject.
    """
    converted = {name: value for name, value in row.items() if name not in _CONVERTED_FIELDS}
    if row.get("images") and "image" not in row:
        images = row["images"]
        converted["image"] = [_path(image) for image in images] if isinstance(images, list) else images
    if row.get("videos"):
        converted["video"] = row["videos"]
    if "conversations" in row:
        converted["conversations"] = _turns(row["conversations"])
    elif "messages" in row:
        converted["conversations"] = _turns(row["messages"])
    elif "texts" in row:
        names = converted.get("image") or []
        num_pictures = 1 if isinstance(names, str) else len(names)
        converted["conversations"] = _turns_of_pairs(row["texts"], num_pictures)
    return converted


def _path(image: Any) -> Any:
    return image["path"] if isinstance(image, dict) and "path" in image else image


def _turns(turns: Any) -> Any:
    if not isinstance(turns, list):
        return turns
    return [_turn(turn) if isinstance(turn, dict) else turn for turn in turns]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    speaker = turn.get("from", turn.get("role"))
    value = turn.get("value", turn.get("content"))
    if isinstance(value, list):
        value = _joined_parts(value)
    return {"from": _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "value": value}


def _joined_parts(parts: list[Any]) -> Any:
    """Return the text of [{"type": "text", "text"}, {"type": "image"}, ..], or `parts` if one is neither."""
    texts = []
    for part in parts:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part_type in ("image", "image_url"):
            texts.append(f"{IMAGE_MARK}\n")
        else:
            return parts
    return "".join(texts)


def _turns_of_pairs(pairs: Any, num_pictures: int) -> Any:
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        return pairs
    turns = []
    for n, pair in enumerate(pairs):
        question = pair.get("user")
        if n == 0 and isinstance(question, str) and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n" * num_pictures + question
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": pair.get("assistant")}]
    return turns
