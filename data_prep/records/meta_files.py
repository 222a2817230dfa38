"""An InternVL meta file for annotation files; `vico init --data` writes it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def meta_of_files(folder: Path, roots: Mapping[Path, Path]) -> dict[str, dict[str, Any]]:
    """Return the sets of a meta file in `folder`: one per annotation file, with the root of its pictures."""
    return {
        path.stem: {
            "root": os.path.relpath(root, folder),
            "annotation": path.name,
            "data_augment": False,
            "repeat_time": 1,
            "length": _num_lines(path),
        }
        for path, root in roots.items()
    }


def meta_text(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a meta file."""
    return json.dumps(sets, indent=2, ensure_ascii=False) + "\n"


def _num_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
