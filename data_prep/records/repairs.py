"""Repaired rows: which quarantined rows they mend, and the blocks of rows that are checked again.

Called by `stages/shard/repair.py`. A line of the file is `{"source", "line", "row"}`, the row put right;
without `row` the original line is checked again, as where only its pictures were mended. Lines of
`quarantine.jsonl` have this form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.records.blocks import Block, block_rows
from data_prep.records.config import RecordSet
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.row_forms import internvl_row
from vico.errors import UserError

Place = tuple[str, int]
"""Name of a set and number of a line in it."""


@dataclass(frozen=True)
class RepairBlock(Block):
    """Rows of one set that are checked again, the content of one new shard.

    `rows` are (line, content) in the order of lines; content None is the original line, which stands in one
    of `origins`. `duplicates` are lines whose repaired row stands in the file before.
    """

    rows: tuple[tuple[int, bytes | None], ...] = ()
    origins: tuple[Block, ...] = ()


def repaired_rows(path: Path, quarantined: set[Place]) -> dict[Place, bytes | None]:
    """What the file says of each quarantined row that it names, in its order; UserError where it names none.

    Rows come as the bytes of an InternVL line.
    """
    found: dict[Place, bytes | None] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place, content = _repair(line, f"inputs.repaired={path}: line {number}")
            if place not in quarantined or place in found:
                what = "stands there twice" if place in found else "is not in quarantine"
                raise UserError(
                    f"inputs.repaired={path}: line {number}: line {place[1]} of {place[0]} {what}; "
                    "take it out of the file"
                )
            found[place] = content
    if not found:
        raise UserError(f"inputs.repaired={path} has no rows; give at least one line")
    return found


def _repair(line: bytes, where: str) -> tuple[Place, bytes | None]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); mend it") from None
    place = (entry.get("source"), entry.get("line")) if isinstance(entry, dict) else (None, None)
    if not isinstance(place[0], str) or type(place[1]) is not int:
        raise UserError(f'{where} does not say which row it mends; write {{"source", "line", "row"}}')
    if "row" not in entry:
        return place, None
    row = entry["row"]
    if not isinstance(row, dict):
        raise UserError(f"{where}: row={str(row)[:60]!r} is not an object; give the row as it should be")
    return place, json.dumps(internvl_row(row)).encode()


def repair_blocks(
    repairs: dict[Place, bytes | None],
    sets: list[RecordSet],
    blocks: list[Block],
    samples_per_shard: int,
    first_number: int,
) -> list[RepairBlock]:
    """The repaired rows in the order of sets and lines, as blocks that follow shard `first_number` - 1.

    `blocks` are those of the records themselves.
    """
    repeated, seen = set[Place](), set[tuple[str, bytes]]()
    for place, content in repairs.items():
        if content is not None:
            mark = (place[0], hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest())
            if mark in seen:
                repeated.add(place)
            seen.add(mark)
    found: list[RepairBlock] = []
    for one in sets:
        lines = sorted(line for name, line in repairs if name == one.name)
        for start in range(0, len(lines), samples_per_shard):
            chosen = lines[start : start + samples_per_shard]
            rows = tuple((line, repairs[one.name, line]) for line in chosen)
            originals = [line for line, content in rows if content is None]
            origins = tuple(
                block for block in blocks if block.records.name == one.name and _holds(block, originals)
            )
            duplicates = tuple(line for line in chosen if (one.name, line) in repeated)
            number = first_number + len(found)
            found.append(
                RepairBlock(number, one, chosen[0], len(chosen), 0, duplicates, rows=rows, origins=origins)
            )
    return found


def _holds(block: Block, lines: list[int]) -> bool:
    return any(block.first_line <= line < block.first_line + block.num_lines for line in lines)


def repair_block_rows(block: RepairBlock) -> Iterator[RawRow]:
    """The rows of the block in the order of lines, one original block in memory at a time."""
    wanted = {line for line, content in block.rows if content is None}
    originals = (raw for origin in block.origins for raw in block_rows(origin) if raw.line in wanted)
    for line, content in block.rows:
        if content is None:
            yield next(originals)
        else:
            picture_bytes = partial(picture_in_root, block.records.root)
            yield RawRow(line, content, line in block.duplicates, picture_bytes)


def mended_ledger(
    base: list[dict[str, Any]], tried: set[Place], still_bad: dict[Place, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of the base's ledger without those that are good now; what is still bad has its new reason."""
    found = []
    for entry in base:
        place = entry["source"], entry["line"]
        if place not in tried:
            found.append(entry)
        elif place in still_bad:
            found.append(still_bad[place])
    return found


@dataclass(frozen=True)
class Repairs:
    """A file of repaired rows, and the shard stage's output that it mends with its fingerprint."""

    file: Path
    base: Path
    fingerprint: str
