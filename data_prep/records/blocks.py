"""Records as blocks of consecutive rows, one block per shard, and the reading of one block.

One streaming pass over each file finds where its blocks start and which rows it repeats; a task then reads
its block from there. The modules of the formats know what a row looks like.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType

import numpy as np

from data_prep.records.config import RecordsConfig
from data_prep.records.raw_rows import RawRow, picture_data, picture_names
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import normal_form
from data_prep.records.sets import RecordFile, RecordSet
from data_prep.records.text_rows import text_digests, text_rows
from vico.errors import UserError

_LINES_PER_TICK = 20_000
_MANY_SHARDS = 20
logger = logging.getLogger(__name__)
NOT_REPAIRED: Mapping[int, bytes] = MappingProxyType({})
_NUM_PROBED_BLOCKS, _NUM_PROBED_ROWS = 8, 8


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one set, the content of shard `number`.

    Lines count from 0 in their set. `offset` is where the first of them starts: a byte (of the uncompressed
    tar), or a row number in a parquet file (0 for the demo). `duplicates` are the lines of the block whose
    content is also on an earlier line of the set.
    """

    number: int
    record_set: RecordSet
    first_line: int
    num_lines: int
    offset: int = 0
    duplicates: tuple[int, ...] = ()


def record_blocks(
    sets: list[RecordSet], samples_per_shard: int, tick: Callable[[], None] = lambda: None
) -> list[Block]:
    """Return the blocks of all sets, numbered in order; `tick` is called regularly while files are read."""
    blocks: list[Block] = []
    for record_set in sets:
        rows = record_set.rows
        set_blocks = (
            _demo_blocks(record_set, rows, samples_per_shard)
            if isinstance(rows, RecordsConfig)
            else _file_blocks(record_set, rows, samples_per_shard, tick)
        )
        for block in set_blocks:
            blocks.append(replace(block, number=len(blocks)))
    return blocks


def first_block(record_set: RecordSet, num_rows: int) -> Block | None:
    """Return at most the first `num_rows` rows of a set's file, or None. The rest is not read."""
    assert isinstance(record_set.rows, RecordFile), "the demo has no file"
    rows = list(islice(_digests(record_set.rows), num_rows))
    if not rows:
        return None
    digests = np.frombuffer(b"".join(digest for _, digest in rows), np.uint64).reshape(-1, 2)
    return Block(0, record_set, 0, len(rows), rows[0][0], tuple(repeated_lines(digests).tolist()))


def block_rows(block: Block, repaired: Mapping[int, bytes] = NOT_REPAIRED) -> Iterator[RawRow]:
    """Yield the rows of a block, one at a time. Raises UserError when its file has fewer rows than before.

    Rows of a tar or parquet file get the lines in `repaired` instead of their own and keep their pictures.
    """
    source = block.record_set.rows
    if isinstance(source, RecordsConfig):
        yield from _demo_rows(block, source)
        return
    num_rows = 0
    for row in _file_rows(block, source, repaired):
        num_rows += 1
        yield row
    if num_rows != block.num_lines:
        raise UserError(f"{source.path} became shorter during sharding; do not change it, and run again")


def _file_rows(block: Block, source: RecordFile, repaired: Mapping[int, bytes]) -> Iterator[RawRow]:
    first, count, duplicates = block.first_line, block.num_lines, frozenset(block.duplicates)
    if source.format == "parquet":
        from data_prep.records.containers.parquet_rows import parquet_rows

        return parquet_rows(source, first, count, duplicates, repaired)
    if source.format == "webdataset":
        from data_prep.records.containers.tar_rows import tar_rows

        return tar_rows(source, block.offset, first, count, duplicates, repaired)
    return text_rows(source, block.offset, first, count, duplicates)


def estimated_bytes(blocks: Sequence[Block]) -> int:
    """Estimate the bytes of the shards of these blocks from the first rows of a few blocks.

    The blocks from one of them to the next have its bytes per row: sets of long and of short rows each count
    by their own number of rows.
    """
    step = max(1, math.ceil(len(blocks) / _NUM_PROBED_BLOCKS))
    num_bytes = 0.0
    for first in range(0, len(blocks), step):
        represented = blocks[first : first + step]
        num_rows = min(represented[0].num_lines, _NUM_PROBED_ROWS)
        probed = sum(map(_row_bytes, block_rows(replace(represented[0], num_lines=num_rows))))
        num_bytes += probed / max(1, num_rows) * sum(block.num_lines for block in represented)
    return int(num_bytes)


def _row_bytes(row: RawRow) -> int:
    """Return the bytes of a row's tar members with padding; a malformed row counts only its line, if any."""
    total = 1024 + (len(row.content) if isinstance(row.content, bytes) else 0)
    try:
        normal = normal_form(row)
        if not isinstance(row.content, bytes):
            total += len(json.dumps(normal["conversations"]))
        for name in picture_names(normal):
            total += 1024 + len(picture_data(row, name))
    except Rejected:
        return total  # the checks count malformed rows and rejected pictures; an estimate need not
    return total


def _file_blocks(
    record_set: RecordSet, source: RecordFile, samples_per_shard: int, tick: Callable[[], None]
) -> Iterator[Block]:
    """Yield the blocks of a file after one pass over it, which keeps 16 bytes per row to find repeats."""
    starts: list[int] = []
    digests = bytearray()
    num_rows = 0
    for start, digest in _digests(source):
        if num_rows % samples_per_shard == 0:
            starts.append(start)
        if num_rows % _LINES_PER_TICK == 0:
            tick()
        digests += digest
        num_rows += 1
    if source.format == "parquet":
        _warn_of_large_row_groups(source, samples_per_shard)
    duplicates = repeated_lines(np.frombuffer(digests, np.uint64).reshape(-1, 2))
    for n, start in enumerate(starts):
        first = n * samples_per_shard
        last = min(first + samples_per_shard, num_rows)
        inside = duplicates[np.searchsorted(duplicates, first) : np.searchsorted(duplicates, last)]
        yield Block(0, record_set, first, last - first, start, tuple(inside.tolist()))


def _warn_of_large_row_groups(source: RecordFile, samples_per_shard: int) -> None:
    from data_prep.records.containers.parquet_rows import rows_of_largest_group

    num_rows = rows_of_largest_group(source.path)
    if num_rows > _MANY_SHARDS * samples_per_shard:
        logger.warning(
            "%s has a row group of %d rows, which each of %d tasks decodes up to its own rows; written again "
            "with row_group_size=%d it is read faster",
            source.path,
            num_rows,
            num_rows // samples_per_shard,
            samples_per_shard,
        )


def _digests(source: RecordFile) -> Iterator[tuple[int, bytes]]:
    """Return (start, digest of the content) of every row; what a start is, `Block.offset` says."""
    if source.format == "parquet":
        from data_prep.records.containers.parquet_rows import parquet_digests

        return parquet_digests(source.path)
    if source.format == "webdataset":
        from data_prep.records.containers.tar_samples import sample_digests

        return sample_digests(source.path)
    return text_digests(source)


def repeated_lines(digests: np.ndarray) -> np.ndarray:
    """Return the sorted numbers of the rows of `digests` (uint64 [lines, 2]) that equal an earlier row."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests keep the order of their lines
    ordered = digests[order]
    return np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)])


def _demo_blocks(record_set: RecordSet, config: RecordsConfig, samples_per_shard: int) -> Iterator[Block]:
    for first in range(0, config.num_samples, samples_per_shard):
        yield Block(0, record_set, first, min(samples_per_shard, config.num_samples - first))


def _demo_rows(block: Block, config: RecordsConfig) -> Iterator[RawRow]:
    from data_prep.demo.records import demo_record

    for line in range(block.first_line, block.first_line + block.num_lines):
        row, pictures = demo_record(config.seed, line)
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        pictures_by_name = dict(zip(names, pictures, strict=True))
        yield RawRow(line, json.dumps(row, ensure_ascii=False).encode(), False, pictures_by_name.__getitem__)
