"""Records as blocks of consecutive rows, one block a shard, and the reading of one block.

One streaming pass over each file finds where its blocks start and which rows stand there twice; a task reads
its block from there. What a row looks like is the business of the formats' own modules.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

import numpy as np

from data_prep.records.config import RecordSet
from data_prep.records.json_lists import first_byte, list_elements
from data_prep.records.pictures import picture_in_root
from data_prep.records.raw_rows import DIGEST_BYTES, RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import converted
from data_prep.remote_files import Place, opened
from vico.errors import UserError

_LINES_PER_TICK = 20_000
_NUM_PROBED_BLOCKS, _NUM_PROBED_ROWS = 8, 8


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one set, the content of shard `number`.

    Lines count from 0 in their set. `offset` says where the first of them starts: its byte, or its number in
    a parquet file (0 for the demo); `duplicates` are the lines of the block whose content stands on an
    earlier line of the set.
    """

    number: int
    records: RecordSet
    first_line: int
    num_lines: int
    offset: int = 0
    duplicates: tuple[int, ...] = ()


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
    """The rows of a block, one at a time; UserError when its file has fewer rows than it had."""
    records, duplicates = block.records, set(block.duplicates)
    if records.demo is not None:
        found = _demo_rows(block)
    elif records.format == "parquet":
        from data_prep.records.parquet_rows import parquet_rows

        found = parquet_rows(records.annotation, records.root, block.first_line, block.num_lines, duplicates)
    elif records.format == "webdataset":
        from data_prep.records.tar_rows import tar_rows

        found = tar_rows(records.annotation, block.offset, block.first_line, block.num_lines, duplicates)
    else:
        found = _text_rows(block, duplicates)
    num_rows = 0
    for row in found:
        num_rows += 1
        yield row
    if num_rows != block.num_lines:
        raise _shorter(records.annotation)


def _shorter(annotation: Place) -> UserError:
    return UserError(f"{annotation} became shorter while it was sharded; leave it alone and run again")


def _text_rows(block: Block, duplicates: set[int]) -> Iterator[RawRow]:
    """Rows of a file of lines, or of a JSON list."""
    records = block.records
    picture_bytes = partial(picture_in_root, records.root)
    with opened(records.annotation) as file:
        if _is_list(records, file):
            contents = (data for _, data in list_elements(file, str(records.annotation), block.offset))
        else:
            file.seek(block.offset)
            contents = (line.strip() for line in file)
        lines = range(block.first_line, block.first_line + block.num_lines)
        for line, content in zip(lines, contents, strict=False):
            row = converted(content) if records.format == "sharegpt" else content
            yield RawRow(line, row, line in duplicates, picture_bytes)


def _is_list(records: RecordSet, file: BinaryIO) -> bool:
    """InternVL's annotations are lines; other text formats come as a JSON list or as lines."""
    return records.format in ("llava", "sharegpt") and first_byte(file) == b"["


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
    except (ValueError, TypeError, AttributeError, RecursionError, Rejected):
        # an ill-formed row, or a picture that is refused: the checks count it, here is an estimate
        return total
    return total


def _annotation_blocks(
    records: RecordSet, samples_per_shard: int, tick: Callable[[], None]
) -> Iterator[Block]:
    """One pass over the file: where every block starts, and 16 bytes a row to find repeated content by."""
    starts: list[int] = []
    digests = bytearray()
    num_rows = 0
    for place, digest in _digests(records):
        if num_rows % samples_per_shard == 0:
            starts.append(place)
        if num_rows % _LINES_PER_TICK == 0:
            tick()
        digests += digest
        num_rows += 1
    duplicates = repeated_lines(np.frombuffer(digests, np.uint64).reshape(-1, 2))
    for n, start in enumerate(starts):
        first = n * samples_per_shard
        last = min(first + samples_per_shard, num_rows)
        inside = duplicates[np.searchsorted(duplicates, first) : np.searchsorted(duplicates, last)]
        yield Block(0, records, first, last - first, start, tuple(inside.tolist()))


def _digests(records: RecordSet) -> Iterator[tuple[int, bytes]]:
    """(where it starts, digest of its content) of every row."""
    if records.format == "parquet":
        from data_prep.records.parquet_rows import parquet_digests

        return parquet_digests(records.annotation)
    if records.format == "webdataset":
        from data_prep.records.tar_rows import tar_digests

        return tar_digests(records.annotation)
    return _text_digests(records)


def _text_digests(records: RecordSet) -> Iterator[tuple[int, bytes]]:
    with opened(records.annotation) as file:
        if _is_list(records, file):
            for offset, content in list_elements(file, str(records.annotation)):
                yield offset, hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            return
        offset = 0
        for content in file:
            yield offset, hashlib.blake2b(content.strip(), digest_size=DIGEST_BYTES).digest()
            offset += len(content)


def repeated_lines(digests: np.ndarray) -> np.ndarray:
    """Sorted numbers of the rows of `digests` (uint64 [lines, 2]) that equal an earlier row."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests keep the order of their lines
    ordered = digests[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)])


def _demo_blocks(records: RecordSet, samples_per_shard: int, tick: Callable[[], None]) -> Iterator[Block]:
    from data_prep.demo.records import num_records

    total = num_records(records.demo)
    for first in range(0, total, samples_per_shard):
        yield Block(0, records, first, min(samples_per_shard, total - first))


def _demo_rows(block: Block) -> Iterator[RawRow]:
    from data_prep.demo.records import demo_record

    for line in range(block.first_line, block.first_line + block.num_lines):
        row, pictures = demo_record(block.records.demo, line)
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        drawn = dict(zip(names, pictures, strict=True))
        yield RawRow(line, json.dumps(row, ensure_ascii=False).encode(), False, drawn.__getitem__)
