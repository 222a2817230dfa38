"""Records as blocks of consecutive lines, one block a shard, and the reading of one block.

The driver finds the blocks in one streaming pass over each annotation file; a task reads its block by byte
range.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from data_prep.pictures import picture_in_root
from data_prep.records import RecordSet
from vico.errors import UserError

_LINES_PER_TICK = 20_000
_NUM_PROBED_BLOCKS, _NUM_PROBED_ROWS = 8, 8


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one set, the content of shard `number`.

    Lines count from 0 in their set. `offset` is the byte where the first of them starts (0 for the demo);
    `duplicates` are the lines of the block whose content stands on an earlier line of the set.
    """

    number: int
    records: RecordSet
    first_line: int
    num_lines: int
    offset: int = 0
    duplicates: tuple[int, ...] = ()


@dataclass(frozen=True)
class RawRow:
    """One line as it was found; `picture_bytes` reads a picture that the row names."""

    line: int
    content: bytes
    is_duplicate: bool
    picture_bytes: Callable[[str], bytes]


def record_blocks(
    sets: list[RecordSet], samples_per_shard: int, tick: Callable[[], None] = lambda: None
) -> list[Block]:
    """The blocks of all sets, numbered in order; `tick` is called now and then while long files are read."""
    blocks: list[Block] = []
    for records in sets:
        found = _demo_blocks if records.demo is not None else _annotation_blocks
        for block in found(records, samples_per_shard, tick):
            blocks.append(replace(block, number=len(blocks)))
    return blocks


def block_rows(block: Block) -> Iterator[RawRow]:
    """The rows of a block, one at a time."""
    if block.records.demo is not None:
        yield from _demo_rows(block)
        return
    duplicates = set(block.duplicates)
    picture_bytes = partial(picture_in_root, block.records.root)
    with open(block.records.annotation, "rb") as file:
        file.seek(block.offset)
        for line in range(block.first_line, block.first_line + block.num_lines):
            content = file.readline()
            if not content:
                raise UserError(
                    f"{block.records.annotation} became shorter while it was sharded; "
                    "leave it alone and run again"
                )
            yield RawRow(line, content.strip(), line in duplicates, picture_bytes)


def estimated_bytes(blocks: list[Block]) -> int:
    """About how many bytes the shards of these blocks take, from the first rows of a few blocks."""
    if not blocks:
        return 0
    chosen = blocks[:: max(1, len(blocks) // _NUM_PROBED_BLOCKS)][:_NUM_PROBED_BLOCKS]
    num_rows, num_bytes = 0, 0
    for block in chosen:
        probed = replace(block, num_lines=min(block.num_lines, _NUM_PROBED_ROWS))
        for row in block_rows(probed):
            num_rows += 1
            num_bytes += _row_bytes(row)
    return num_bytes * sum(block.num_lines for block in blocks) // max(1, num_rows)


def _row_bytes(row: RawRow) -> int:
    """Bytes of a row's tar members, padding included; a row that breaks the form counts its own line only."""
    total = 1024 + len(row.content)
    try:
        names = json.loads(row.content).get("image") or []
        for name in [names] if isinstance(names, str) else names:
            total += 1024 + len(row.picture_bytes(name))
    except Exception:  # a bad row is the checks' business; this is an estimate
        return total
    return total


def _annotation_blocks(
    records: RecordSet, samples_per_shard: int, tick: Callable[[], None]
) -> Iterator[Block]:
    """One pass over the file: where every block starts, and 16 bytes a line to find repeated content by."""
    starts: list[int] = []
    digests = bytearray()
    offset = num_lines = 0
    with open(records.annotation, "rb", buffering=io.DEFAULT_BUFFER_SIZE * 64) as file:
        for content in file:
            if num_lines % samples_per_shard == 0:
                starts.append(offset)
            if num_lines % _LINES_PER_TICK == 0:
                tick()
            digests += hashlib.blake2b(content.strip(), digest_size=16).digest()
            offset += len(content)
            num_lines += 1
    duplicates = repeated_lines(np.frombuffer(digests, np.uint64).reshape(-1, 2))
    for n, start in enumerate(starts):
        first = n * samples_per_shard
        last = min(first + samples_per_shard, num_lines)
        inside = duplicates[np.searchsorted(duplicates, first) : np.searchsorted(duplicates, last)]
        yield Block(0, records, first, last - first, start, tuple(inside.tolist()))


def repeated_lines(digests: np.ndarray) -> np.ndarray:
    """Sorted numbers of the rows of `digests` (uint64 [lines, 2]) that equal an earlier row."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests keep the order of their lines
    ordered = digests[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)])


def _demo_blocks(records: RecordSet, samples_per_shard: int, tick: Callable[[], None]) -> Iterator[Block]:
    from data_prep.demo import num_records

    total = num_records(records.demo)
    for first in range(0, total, samples_per_shard):
        yield Block(0, records, first, min(samples_per_shard, total - first))


def _demo_rows(block: Block) -> Iterator[RawRow]:
    from data_prep.demo import demo_record

    for line in range(block.first_line, block.first_line + block.num_lines):
        row, pictures = demo_record(block.records.demo, line)
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        drawn = dict(zip(names, pictures, strict=True))
        yield RawRow(line, json.dumps(row, ensure_ascii=False).encode(), False, drawn.__getitem__)
