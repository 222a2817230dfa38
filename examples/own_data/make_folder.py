"""Make a folder as a user would bring it: pictures, rows in LLaVA's form, and a few faults.

`python examples/own_data/make_folder.py FOLDER --rows 1200` writes FOLDER/rows.jsonl and FOLDER/pictures/,
and FOLDER/new.png, a picture for the finished model that no row names. The contents are those of the
built-in demo, which the demo model can read. docs/own-data.md trains on them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.demo.records import demo_record

SEED = 21
"""Of other records than those of the quickstart and of the demo model's own training."""
NEW_LINE = 5008
"""The record of new.png: a page with a heading, a text and a photograph."""


def rows_with_pictures(num_rows: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield `num_rows` rows in LLaVA's form, each with the bytes of its picture.

    A row has `id`, `image` (below FOLDER/pictures), `conversations` and `group`: rows whose pictures are made
    from the same photograph or page have the same one.
    """
    num_made = line = 0
    while num_made < num_rows:
        row, pictures = demo_record(SEED, line)
        line += 1
        if pictures:
            own_row = {key: row[key] for key in ("id", "image", "conversations", "group")}
            own_row["id"] = f"row-{num_made + 1}"
            own_row["image"] = f"{own_row['id']}{Path(row['image']).suffix}"
            num_made += 1
            yield own_row, pictures[0]


def add_faults(lines: list[str]) -> None:
    """Break four of at least 40 lines as it happens in real data."""
    lines[6] = lines[6][: len(lines[6]) // 2]  # an interrupted write
    lines[16] = lines[15]  # a row twice
    missing = json.loads(lines[26])
    lines[26] = json.dumps({**missing, "image": "renamed-later.png"})
    unanswered = json.loads(lines[36])
    unanswered["conversations"][-1]["value"] = ""
    lines[36] = json.dumps(unanswered)


def make_folder(folder: Path, num_rows: int) -> None:
    """Write rows and pictures to a folder, which must not exist."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for row, picture in rows_with_pictures(num_rows):
        (folder / "pictures" / row["image"]).write_bytes(picture)
        lines.append(json.dumps(row))
    add_faults(lines)
    _, [new_picture] = demo_record(SEED, NEW_LINE)
    (folder / "new.png").write_bytes(new_picture)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1200, help="number of rows, 40 to 4000 (default: 1200)")
    options = parser.parse_args()
    if not 40 <= options.rows <= 4000:
        parser.error(f"--rows {options.rows}: give 40 to 4000")
    if options.folder.exists():
        parser.error(f"{options.folder} exists; give another folder")
    make_folder(options.folder, options.rows)
    print(f"wrote {options.rows} rows and their pictures to {options.folder}")


if __name__ == "__main__":
    main()
