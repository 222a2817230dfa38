"""An InternVL meta file for a folder of annotation files and pictures; `vico init --data` writes it."""

import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.records.pictures import checked_picture, picture_in_root
from data_prep.records.raw_rows import parsed_row, picture_names
from data_prep.records.rejection import Rejected
from data_prep.remote_files import Location, open_file
from vico.errors import UserError

_NUM_PROBED_ROWS = 50
_MAX_PIXELS = 178_956_970


def meta_of_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the sets of a folder: one per `*.jsonl` file in it, with the root that has most of its pictures.

    Raises UserError when the folder has no such file, or when none of the pictures that one names is found.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder; give one with *.jsonl files and their pictures")
    annotations = sorted(folder.glob("*.jsonl"))
    if not annotations:
        raise UserError(f"--data {folder} has no *.jsonl file; put the rows there, one JSON object per line")
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


def first_row_counts(annotation: Location, root: Location) -> Counter[str]:
    """Count how many of a file's first rows are `good` or have which reason to be rejected.

    Of the pictures only the headers are checked.
    """
    counts: Counter[str] = Counter()
    for content in _first_lines(annotation):
        try:
            for name in picture_names(parsed_row(content)):
                checked_picture(picture_in_root(root, name), name, max_pixels=_MAX_PIXELS, decode=False)
            counts["good"] += 1
        except Rejected as rejected:
            counts[rejected.reason] += 1
    return counts


def _root(annotation: Path, roots: list[Path]) -> Path:
    """Return the root that has most of the first rows' pictures, the first one of equals."""
    names = []
    for content in _first_lines(annotation):
        try:
            names += picture_names(parsed_row(content))
        except Rejected:
            continue
    counts = [sum((root / name).is_file() for name in names) for root in roots]
    if names and not max(counts):
        raise UserError(
            f"{annotation} names pictures such as {names[0]!r}, which are neither in {roots[0]} nor in "
            "a folder in it; put them there"
        )
    return roots[counts.index(max(counts))]


def _first_lines(path: Location) -> list[bytes]:
    with open_file(path) as file:
        return [line.strip() for line in islice(file, _NUM_PROBED_ROWS)]


def _num_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def write_meta(path: Path, sets: dict[str, dict[str, Any]]) -> None:
    path.write_text(json.dumps(sets, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
