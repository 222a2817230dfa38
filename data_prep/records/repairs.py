"""Repaired rows: which quarantined rows they replace, and the blocks of rows that are checked again.

`stages/shard/repair.py` calls this. A line of the file is `{"source", "line", "row"}`; `row` is the corrected
row. Without `row` the original line is checked again, for example when only its pictures were repaired. The
lines of `quarantine.jsonl` have this form.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_prep.records.blocks import Block, block_rows
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import LedgerRow, Rejected
from data_prep.records.sets import RecordFile, RecordSet
from vico.bounded_text import bounded_json, unique_names
from vico.errors import UserError

_MAX_LINE_BYTES = 2**30


@dataclass(frozen=True)
class Repairs:
    """A file of repaired rows, and the output folder and fingerprint of the shard stage that it repairs."""

    file: Path
    base: Path
    fingerprint: str


class RowAddress(NamedTuple):
    """A row by the name of its set and its line there, from 0."""

    source: str
    line: int


@dataclass(frozen=True)
class RepairBlock(Block):
    """Rows of one set that are checked again, the content of one new shard.

    `rows` are (line, content) in line order; content None means the original line. `original_blocks` have
    the rows that are read again: those without content, and all rows of a tar or parquet file, for their
    pictures. `duplicates` are lines whose repaired row appears earlier in the file.
    """

    rows: tuple[tuple[int, bytes | None], ...] = ()
    original_blocks: tuple[Block, ...] = ()


def repaired_rows(path: Path, quarantined: set[RowAddress]) -> dict[RowAddress, bytes | None]:
    """Return the repaired content of each row in the file, in file order, as the bytes of a line.

    None means the original line. Raises UserError when a row is not in quarantine or is repeated, or when the
    file has no rows.
    """
    rows: dict[RowAddress, bytes | None] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            address, content = _repair(line, f"inputs.repaired={path}: line {number}")
            if address not in quarantined or address in rows:
                problem = "is repeated" if address in rows else "is not in quarantine"
                row = json.dumps({"source": address.source, "line": address.line}, ensure_ascii=False)
                raise UserError(
                    f"inputs.repaired={path}: line {number}: {row} {problem}; remove it from the file"
                )
            rows[address] = content
    if not rows:
        raise UserError(f"inputs.repaired={path} has no rows; give at least one line")
    return rows


def _repair(line: bytes, where: str) -> tuple[RowAddress, bytes | None]:
    try:
        repair = bounded_json(line, _MAX_LINE_BYTES, unique_names)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); fix it") from None
    source, number = (repair.get("source"), repair.get("line")) if isinstance(repair, dict) else (None, None)
    if not isinstance(source, str) or type(number) is not int:
        raise UserError(f'{where} does not say which row it repairs; write {{"source", "line", "row"}}')
    if "row" not in repair:
        return RowAddress(source, number), None
    row = repair["row"]
    if not isinstance(row, dict):
        raise UserError(f"{where}: row={str(row)[:60]!r} is not an object; give the corrected row")
    return RowAddress(source, number), json.dumps(row).encode()


def repair_blocks(
    repairs: dict[RowAddress, bytes | None],
    sets: list[RecordSet],
    blocks: list[Block],
    samples_per_shard: int,
    first_number: int,
) -> list[RepairBlock]:
    """Return the repaired rows in the order of sets and lines, as blocks numbered from `first_number`.

    `blocks` are the blocks of the records themselves.
    """
    repeated = _repeated_rows(repairs)
    lines_of_sets: dict[str, list[int]] = {record_set.name: [] for record_set in sets}
    for address in repairs:
        if address.source in lines_of_sets:
            lines_of_sets[address.source].append(address.line)
    blocks_of_sets: dict[str, list[Block]] = {record_set.name: [] for record_set in sets}
    for block in blocks:
        blocks_of_sets[block.record_set.name].append(block)
    again: list[RepairBlock] = []
    for record_set in sets:
        name = record_set.name
        lines, own_blocks = sorted(lines_of_sets[name]), blocks_of_sets[name]
        for start in range(0, len(lines), samples_per_shard):
            chosen = lines[start : start + samples_per_shard]
            rows = tuple((line, repairs[RowAddress(name, line)]) for line in chosen)
            originals = [line for line, content in rows if content is None or holds_pictures(record_set)]
            again.append(
                RepairBlock(
                    number=first_number + len(again),
                    record_set=record_set,
                    first_line=chosen[0],
                    num_lines=len(chosen),
                    duplicates=tuple(line for line in chosen if RowAddress(name, line) in repeated),
                    rows=rows,
                    original_blocks=tuple(_blocks_with(originals, own_blocks)),
                )
            )
    return again


def _repeated_rows(repairs: dict[RowAddress, bytes | None]) -> set[RowAddress]:
    """Return the rows whose repaired content is also that of an earlier row of the same set."""
    repeated, seen = set[RowAddress](), set[tuple[str, bytes]]()
    for address, content in repairs.items():
        if content is not None:
            digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            if (address.source, digest) in seen:
                repeated.add(address)
            seen.add((address.source, digest))
    return repeated


def _blocks_with(lines: list[int], blocks: list[Block]) -> list[Block]:
    """Return the blocks that have any of the lines; both are sorted."""
    first_lines = [block.first_line for block in blocks]
    numbers = sorted({bisect.bisect(first_lines, line) - 1 for line in lines})
    return [blocks[number] for number in numbers]


def holds_pictures(record_set: RecordSet) -> bool:
    """Return whether the pictures of a set are in the file of its rows."""
    return isinstance(record_set.rows, RecordFile) and record_set.rows.format in ("parquet", "webdataset")


def repair_block_rows(block: RepairBlock) -> Iterator[RawRow]:
    """Yield the rows of the block in line order, reading one original block at a time."""
    contents = {line: content for line, content in block.rows if content is not None}
    read_again = {line for line, _ in block.rows} - (
        set() if holds_pictures(block.record_set) else set(contents)
    )
    originals = (
        raw
        for original in block.original_blocks
        for raw in block_rows(original, contents)
        if raw.line in read_again
    )
    source = block.record_set.rows
    picture_bytes = (
        partial(picture_in_root, source.root, follow_links=source.follow_links)
        if isinstance(source, RecordFile)
        else _no_picture
    )
    for line, content in block.rows:
        raw = next(originals) if line in read_again else RawRow(line, contents[line], False, picture_bytes)
        yield raw if content is None else replace(raw, is_duplicate=line in block.duplicates)


def _no_picture(name: str) -> bytes:
    raise Rejected("missing_image", f"{name} is not a file; the demo draws its pictures")


def repaired_ledger(
    base: list[LedgerRow], tried: set[RowAddress], still_bad: dict[RowAddress, LedgerRow]
) -> list[LedgerRow]:
    """Return the base's ledger without the rows that are good now, with new reasons for those still bad."""
    ledger = []
    for row in base:
        address = RowAddress(row["source"], row["line"])
        if address not in tried:
            ledger.append(row)
        elif address in still_bad:
            ledger.append(still_bad[address])
    return ledger
