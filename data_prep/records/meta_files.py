"""An InternVL meta file for a folder of annotation files and pictures; `vico init --data` writes it."""

import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.records.pictures import checked_picture, picture_in_root
from data_prep.records.raw_rows import parsed_row
from data_prep.records.rejection import Rejected
from vico.errors import UserError

_NUM_PROBED_ROWS = 50
_MAX_PIXELS = 178_956_970


def meta_of_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """The sets of a folder: one for each `*.jsonl` in it, with the root under which most of its first
    pictures are found. UserError when there is no such file, or pictures are named and none is found.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder; name one with *.jsonl files and their pictures")
    annotations = sorted(folder.glob("*.jsonl"))
    if not annotations:
        raise UserError(f"--data {folder} has no *.jsonl file; put the rows there, one JSON object a line")
    roots = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return {
        path.stem: {
            "root": os.path.relpath(_root(path, roots), folder),
            "annotation": path.name,
            "data_augment": False,
            "repeat_time": 1,
            "length": _num_lines(path),
        }
        for path in annotations
    }


def probed(annotation: Path, root: Path) -> Counter[str]:
    """What the first rows of a file are worth: counts of `good` and of reasons; pictures by their headers."""
    found: Counter[str] = Counter()
    for content in _first_lines(annotation):
        try:
            for name in _names(parsed_row(content)):
                checked_picture(picture_in_root(root, name), name, max_pixels=_MAX_PIXELS, decode=False)
            found["good"] += 1
        except Rejected as rejected:
            found[rejected.reason] += 1
    return found


def _root(annotation: Path, roots: list[Path]) -> Path:
    """The root with most of the pictures of the first rows; the first of equals."""
    names = []
    for content in _first_lines(annotation):
        try:
            names += _names(parsed_row(content))
        except Rejected:
            continue
    counts = [sum((root / name).is_file() for name in names) for root in roots]
    if names and not max(counts):
        raise UserError(
            f"{annotation} names pictures such as {names[0]!r}, which lie neither in {roots[0]} nor in "
            "a folder of it; put them there"
        )
    return roots[counts.index(max(counts))]


def _names(row: dict[str, Any]) -> list[str]:
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Rejected("broken_row", "image is neither a path nor a list of paths")
    return names


def _first_lines(path: Path) -> list[bytes]:
    with open(path, "rb") as file:
        return [line.strip() for line in islice(file, _NUM_PROBED_ROWS)]


def _num_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def write_meta(path: Path, sets: dict[str, dict[str, Any]]) -> None:
    path.write_text(json.dumps(sets, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
