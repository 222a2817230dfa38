"""Rows of other formats as InternVL rows: `conversations` of {from, value}, `image` as a list of names."""

import json
from typing import Any

from vico.settings import IMAGE_MARK

_SPEAKERS = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "system": "system"}


def converted(content: bytes) -> bytes:
    """The line of a ShareGPT row (`messages`, `images`) as the line of an InternVL row.

    A line that is no object stays as it is, so that the checks name what is wrong with it.
    """
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return content
    if not isinstance(row, dict):
        return content
    return json.dumps(internvl_row(row), ensure_ascii=True).encode()


def internvl_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `conversations` and `image` in InternVL's form; other fields are kept.

    `messages` of {role, content} (content may be a list of parts), `texts` of {user, assistant} with the
    pictures before the first question, `images` and `videos` are turned over. What does not fit is left for
    the checks.
    """
    found = {
        name: value for name, value in row.items() if name not in ("messages", "texts", "images", "videos")
    }
    if row.get("images") and "image" not in row:
        images = row["images"]
        found["image"] = [_path(one) for one in images] if isinstance(images, list) else images
    if row.get("videos"):
        found["video"] = row["videos"]
    if "conversations" in row:
        found["conversations"] = _turns(row["conversations"])
    elif "messages" in row:
        found["conversations"] = _turns(row["messages"])
    elif "texts" in row:
        names = found.get("image") or []
        found["conversations"] = _pair_turns(row["texts"], 1 if isinstance(names, str) else len(names))
    return found


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
    """Text of [{"type": "text", "text"}, {"type": "image"}, ..]; the parts themselves when one is another."""
    pieces = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "image_url"):
            pieces.append(f"{IMAGE_MARK}\n")
        else:
            return parts
    return "".join(pieces)


def _pair_turns(texts: Any, num_pictures: int) -> Any:
    if not isinstance(texts, list) or not all(isinstance(pair, dict) for pair in texts):
        return texts
    turns = []
    for n, pair in enumerate(texts):
        question = pair.get("user")
        if n == 0 and isinstance(question, str) and IMAGE_MARK not in question:
            question = f"{IMAGE_MARK}\n" * num_pictures + question
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": pair.get("assistant")}]
    return turns
