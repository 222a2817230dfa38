"""One block of records written as one shard: its tar, and its rows of the index and of the ledger.

Pure: the same block, rules and tokenizer give the same bytes. `stages/shard/stage.py` maps it over Ray tasks.
"""

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.records.blocks import Block, block_rows
from data_prep.records.raw_rows import RawRow, parsed_row, record_id
from data_prep.records.rejection import Rejected
from data_prep.records.repairs import RepairBlock, repair_block_rows
from data_prep.shards.checks import RowRules, Sample, checked_sample
from data_prep.shards.index import SCHEMA
from data_prep.shards.names import sample_key, shard_name
from data_prep.shards.split import Shares, split_of
from data_prep.shards.tars import NoTar, ShardTar
from vico.prompt import PromptFormat

_ENCODED = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for every row
LEAK_MESSAGE = "a picture of it (by its bytes) stands on another side too, further from training"


@dataclass(frozen=True)
class ShardSettings:
    """What holds for the rows of a block: their rules and the shares of the splits."""

    rules: RowRules
    shares: Shares


@dataclass(frozen=True)
class ShardContent:
    """What a written shard holds: rows of the index, rows of the quarantine ledger, facts of its tar."""

    table: pa.Table
    quarantine: list[dict[str, Any]]
    facts: dict[str, Any]


def write_shard(
    path: Path | None,
    block: Block,
    settings: ShardSettings,
    prompt_format: PromptFormat,
    leaked: Container[int] = (),
) -> ShardContent:
    """Write the block's good rows to a tar at `path`; every row is once in the table or the quarantine.

    `leaked` are lines that straddle the split by what other rows hold. Without a path nothing is written, and
    the content says what would have been.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    quarantine: list[dict[str, Any]] = []
    with NoTar() if path is None else ShardTar(path) as tar:
        for raw in repair_block_rows(block) if isinstance(block, RepairBlock) else block_rows(block):
            try:
                sample = checked_sample(raw, settings.rules, prompt_format)
                split = _split(sample, block, raw.line, settings.shares)
                if raw.line in leaked:
                    raise Rejected("straddles_split", LEAK_MESSAGE)
            except Rejected as rejected:
                quarantine.append(_ledger_row(block, raw, rejected))
                continue
            for name, value in _written_row(tar, block, raw.line, sample, split).items():
                columns[name].append(value)
    facts = {
        "name": shard_name(block.number),
        "source": block.records.name,
        "first_line": block.first_line,
        "read": block.num_lines,
        "samples": len(columns["key"]),
        "bytes": tar.num_bytes,
        "sha256": tar.sha256,
    }
    return ShardContent(pa.Table.from_pydict(columns, schema=SCHEMA), quarantine, facts)


def _split(sample: Sample, block: Block, line: int, shares: Shares) -> str:
    if block.records.heldout:
        return "test"
    key = sample_key(block.records.slug, line)
    return split_of(shares, key=key, group=sample.group, pictures=[p.sha256 for p in sample.pictures])


def _written_row(
    tar: ShardTar | NoTar, block: Block, line: int, sample: Sample, split: str
) -> dict[str, Any]:
    """Append the sample's members to the tar; its row of the index."""
    key = sample_key(block.records.slug, line)
    extensions = _extensions(sample)
    text = _ENCODED(_member_json(key, block, line, sample, extensions)).encode("utf-8")
    pictures = [(extension, one.data) for extension, one in zip(extensions, sample.pictures, strict=True)]
    json_member, *members = tar.write(key, [("json", text), *pictures])
    return {
        "shard": block.number,
        "key": key,
        "source": block.records.name,
        "line": line,
        "split": split,
        "group": sample.group,
        "kind": sample.kind,
        "license": sample.license or block.records.license,
        "origin": sample.origin or block.records.origin,
        "repeat": block.records.repeat,
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
    return {
        "id": sample.record_id,
        "source": block.records.name,
        "line": line,
        "conversations": sample.conversations,
        "images": [f"{key}.{extension}" for extension in extensions],
        "kind": sample.kind,
        "group": sample.group,
        "repeat": block.records.repeat,
        "max_tiles": sample.max_tiles,
        **({"license": row_license} if (row_license := sample.license or block.records.license) else {}),
        **({"origin": origin} if (origin := sample.origin or block.records.origin) else {}),
        **sample.fields,
    }


def _ledger_row(block: Block, raw: RawRow, rejected: Rejected) -> dict[str, Any]:
    try:
        found_id = record_id(parsed_row(raw.content))
    except Rejected:
        found_id = None
    return {
        "id": found_id,
        "source": block.records.name,
        "line": raw.line,
        "reason": rejected.reason,
        "message": rejected.message,
    }
