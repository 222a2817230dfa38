"""The reasons for not writing a row, one word each, and the form of a line of `quarantine.jsonl`."""

from typing import TypedDict

REASONS: dict[str, str] = {
    "not_utf8": "The line is not UTF-8, or its text contains half of a surrogate pair.",
    "not_json": "The line is empty, not JSON, or has one name twice.",
    "not_an_object": "The line is JSON but not an object.",
    "broken_row": "A field is missing or has the wrong type, or the turns do not alternate human, gpt. NaN "
    "and infinite numbers count as missing.",
    "video": "The row has a video; only pictures are supported.",
    "audio": "The row has a sound; only pictures are supported.",
    "unread_field": (
        "A field that changes what is learned is not read: a picture in an unknown field or in an answer, "
        "tools, a preference, a weight other than 0 and 1, boxes without a place."
    ),
    "no_answer": "The conversation has no gpt turn, ends with a question, or has no answer to learn.",
    "empty_answer": "An answer is empty or only white space.",
    "duplicate": "The same line appears earlier in the same set.",
    "missing_image": "A picture file does not exist.",
    "path_outside_root": "The path of a picture leads out of the set's root, directly or through a link.",
    "not_a_file": "The path of a picture is a folder or a device.",
    "unreadable_image": "The permissions of a picture file do not allow reading it.",
    "picture_format": "A picture is not JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, or has 32 bits per channel.",
    "undecodable_image": "A picture is truncated or damaged.",
    "too_many_pixels": "A picture has more pixels than shard.max_pixels.",
    "image_count": "The conversation has more or fewer <image> marks than the row has pictures.",
    "control_token": "A text spells a control token of the tokenizer, such as </img>.",
    "over_budget": "Text and tiles take more tokens than shard.max_tokens.",
    "straddles_split": (
        "One of its pictures is in another split, through a group, a held-out row or, for a repaired row, "
        "the old shards."
    ),
}


_SHOWN_CHARACTERS = 120


class LedgerRow(TypedDict):
    """One quarantined row: `id` is the record's own id, `line` counts from 0 in the set `source`."""

    id: str | None
    source: str
    line: int
    reason: str
    message: str


def shown_line(row: LedgerRow) -> int:
    """Return the row's line for a message to people: it counts from 1, as editors do."""
    return row["line"] + 1


class Rejected(Exception):
    """A row that goes to quarantine: `reason` is a word of REASONS, `message` gives the details."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        message = message.encode("utf-8", "backslashreplace").decode()  # names in a tar may be of any bytes
        super().__init__(reason, message)
        self.reason, self.message = reason, message


def shown(text: str) -> str:
    """Return a name or value of a row for a message: on one line, the middle of a long one left out.

    In quotes if it begins or ends with white space, which would not be seen otherwise.
    """
    if text != text.strip() and len(text) <= _SHOWN_CHARACTERS:
        return repr(text)
    line = " ".join(text.split()) if len(text) <= _SHOWN_CHARACTERS else ""
    if line or not text:
        return line
    head, tail = (" ".join(part.split()) for part in (text[:60], text[-20:]))
    return f"{head}..{tail} ({len(text)} characters)"
