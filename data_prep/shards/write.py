"""Writing of one block of records as one shard: its tar, its rows of the index and of the quarantine ledger.

Pure: the same block, rules and tokenizer give the same bytes. `stages/shard/stage.py` maps it over Ray tasks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from data_prep.records.blocks import Block, block_rows
from data_prep.records.raw_rows import RawRow, parsed_row, record_id
from data_prep.records.rejection import LedgerRow, Rejected
from data_prep.records.repairs import RepairBlock, repair_block_rows
from data_prep.shards.checks import RowRules, Sample, checked_sample
from data_prep.shards.index import SCHEMA
from data_prep.shards.names import sample_key, shard_name
from data_prep.shards.split import Shares, split_of
from data_prep.shards.tars import NoTar, ShardTar
from vico.prompt import PromptFormat

# json.dumps would create an encoder for every row. No row contains itself, so json need not look for that.
_ENCODED = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
LEAK_MESSAGE = (
    "one of its pictures (by its bytes) is also in another split, through a group, a held-out row or, for a "
    "repaired row, the old shards"
)


@dataclass(frozen=True)
class ShardSettings:
    """The settings for the rows of a block: their rules and the shares of the splits."""

    rules: RowRules
    shares: Shares


@dataclass(frozen=True)
class SplitDecisions:
    """What the rows of all shards together decide about lines of one shard."""

    leaked: frozenset[int] = frozenset()
    """Lines to leave out: they straddle the split because of other rows."""
    moved: Mapping[int, str] = field(default_factory=dict)
    """Line -> split, for rows that take the side of rows with which they share pictures."""


class ShardEntry(TypedDict):
    """What the manifest says of a shard's tar; `read` and `samples` are numbers of rows read and written."""

    name: str
    source: str
    first_line: int
    read: int
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardContent:
    """The content of a shard: its rows of the index, its rows of the ledger, its manifest entry."""

    table: pa.Table
    quarantine: list[LedgerRow]
    entry: ShardEntry


def write_shard(
    path: Path | None,
    block: Block,
    settings: ShardSettings,
    prompt_format: PromptFormat,
    decisions: SplitDecisions | None = None,
) -> ShardContent:
    """Write the block's good rows to a tar at `path`; every row is once in the table or in the quarantine.

    Without `decisions` each row has the split that it draws by itself. Without a path nothing is written, and
    the content says what would be.
    """
    decisions = decisions or SplitDecisions()
    rows: list[dict[str, Any]] = []
    quarantine: list[LedgerRow] = []
    with NoTar() if path is None else ShardTar(path) as tar:
        for raw in repair_block_rows(block) if isinstance(block, RepairBlock) else block_rows(block):
            try:
                sample = checked_sample(raw, settings.rules, prompt_format)
                key = sample_key(block.record_set.slug, raw.line)
                split = decisions.moved.get(raw.line) or _split(sample, block, key, settings.shares)
                if raw.line in decisions.leaked:
                    raise Rejected("straddles_split", LEAK_MESSAGE)
            except Rejected as rejected:
                quarantine.append(_ledger_row(block, raw, rejected))
                continue
            rows.append(_written_row(tar, block, raw.line, key, sample, split))
    entry = ShardEntry(
        name=shard_name(block.number),
        source=block.record_set.name,
        first_line=block.first_line,
        read=block.num_lines,
        samples=len(rows),
        bytes=tar.num_bytes,
        sha256=tar.sha256,
    )
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    return ShardContent(pa.Table.from_pydict(columns, schema=SCHEMA), quarantine, entry)


def _split(sample: Sample, block: Block, key: str, shares: Shares) -> str:
    if block.record_set.heldout:
        return "test"
    return split_of(shares, key=key, group=sample.group, pictures=[p.sha256 for p in sample.pictures])


def _written_row(
    tar: ShardTar | NoTar, block: Block, line: int, key: str, sample: Sample, split: str
) -> dict[str, Any]:
    """Append the sample's members to the tar and return its row of the index."""
    record_set = block.record_set
    extensions = _extensions(sample)
    text = _ENCODED(_member_json(key, block, line, sample, extensions)).encode("utf-8")
    pictures = [
        (extension, picture.data) for extension, picture in zip(extensions, sample.pictures, strict=True)
    ]
    json_member, *members = tar.write(key, [("json", text), *pictures])
    return {
        "shard": block.number,
        "key": key,
        "source": record_set.name,
        "line": line,
        "split": split,
        "group": sample.group,
        "kind": sample.kind,
        "license": sample.license or record_set.license,
        "origin": sample.origin or record_set.origin,
        "repeat": record_set.repeat,
        "json_offset": json_member.offset,
        "json_bytes": json_member.num_bytes,
        "image_offsets": [member.offset for member in members],
        "image_bytes": [member.num_bytes for member in members],
        "image_sha256": [picture.sha256 for picture in sample.pictures],
        "widths": [picture.width for picture in sample.pictures],
        "heights": [picture.height for picture in sample.pictures],
        "tiles": sample.tiles,
        "num_tiles": sum(sample.tiles),
        "max_tiles": sample.max_tiles,
        "text_tokens": sample.text_tokens,
        "answer_tokens": sample.answer_tokens,
    }


def _extensions(sample: Sample) -> list[str]:
    extensions = [picture.extension for picture in sample.pictures]
    return (
        extensions if len(extensions) == 1 else [f"{n}.{extension}" for n, extension in enumerate(extensions)]
    )


def _member_json(
    key: str, block: Block, line: int, sample: Sample, extensions: Sequence[str]
) -> dict[str, Any]:
    license_, origin = sample.license or block.record_set.license, sample.origin or block.record_set.origin
    return {
        "id": sample.record_id,
        "source": block.record_set.name,
        "line": line,
        "conversations": sample.conversations,
        "images": [f"{key}.{extension}" for extension in extensions],
        "kind": sample.kind,
        "group": sample.group,
        "repeat": block.record_set.repeat,
        "max_tiles": sample.max_tiles,
        **({"license": license_} if license_ else {}),
        **({"origin": origin} if origin else {}),
        **sample.fields,
    }


def _ledger_row(block: Block, raw: RawRow, rejected: Rejected) -> LedgerRow:
    try:
        row_id = record_id(parsed_row(raw.content))
    except Rejected:
        row_id = None
    return LedgerRow(
        id=row_id,
        source=block.record_set.name,
        line=raw.line,
        reason=rejected.reason,
        message=rejected.message,
    )
