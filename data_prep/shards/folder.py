"""The shard stage's output: sidecars of single shards, and what is put together from them.

A shard's sidecar (its rows of the index; ledger rows and tar facts in the file's metadata) is written
before its tar, both into `sidecars/`. When all are there it is known which samples straddle the
split by the pictures of others: a shard without any moves to its final name as it is, one with some is
written again without them, its new sidecar (`.kept`) first. A shard is complete when its tar has its final
name. The sidecars go once the manifest, which is written last, is there.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.shards.index import SCHEMA
from data_prep.shards.names import kept_sidecar_name, shard_name, sidecar_name
from data_prep.shards.split import SPLITS
from data_prep.shards.write import ShardContent
from vico.errors import UserError

MANIFEST_SCHEMA = 2
_META_KEY = b"vico.shard"
_ROWS_PER_GROUP = 16_384
_NUM_NAMED = 50  # licences and origins that the manifest names


def write_sidecar(path: Path, content: ShardContent) -> None:
    """Everything of a shard but its tar, in one file."""
    about = {"facts": content.facts, "quarantine": content.quarantine}
    metadata = {**SCHEMA.metadata, _META_KEY: json.dumps(about, ensure_ascii=False).encode()}
    pq.write_table(content.table.replace_schema_metadata(metadata), path)


def read_sidecar(path: Path) -> ShardContent:
    with pq.ParquetFile(path) as file:  # pq.read_table takes four times as long to start
        table = file.read()
    about = json.loads(table.schema.metadata[_META_KEY])
    return ShardContent(table.replace_schema_metadata(SCHEMA.metadata), about["quarantine"], about["facts"])


def checked_contents(folder: Path, num_shards: int) -> Iterator[ShardContent]:
    """The contents of all shards in order as they were checked, each by itself."""
    for number in range(num_shards):
        yield read_sidecar(folder / sidecar_name(number))


def contents(folder: Path, num_shards: int) -> Iterator[ShardContent]:
    """The contents of all shards in order; UserError when a tar has another size than it was written with."""
    for number in range(num_shards):
        kept = folder / kept_sidecar_name(number)
        content = read_sidecar(kept if kept.exists() else folder / sidecar_name(number))
        tar = folder / shard_name(number)
        found, written = tar.stat().st_size, content.facts["bytes"]
        if found != written:
            raise UserError(
                f"{tar} has {found} bytes but was written with {written}; run again with --force shard"
            )
        yield content


def write_index(path: Path, found: Iterable[ShardContent]) -> None:
    """index.parquet from the shards in order, in row groups of even size, holding little more than one."""
    with pq.ParquetWriter(path, SCHEMA) as writer:
        waiting = SCHEMA.empty_table()
        for content in found:
            waiting = pa.concat_tables([waiting, content.table])
            while len(waiting) >= _ROWS_PER_GROUP:
                writer.write_table(waiting.slice(0, _ROWS_PER_GROUP).combine_chunks())
                waiting = waiting.slice(_ROWS_PER_GROUP)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())


def write_quarantine(path: Path, found: Iterable[ShardContent]) -> None:
    """quarantine.jsonl: one JSON object a line, in the order of the records."""
    with open(path, "w", encoding="utf-8") as file:
        for content in found:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in content.quarantine)


def manifest(found: Iterable[ShardContent], sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Totals, totals by set and by reason, and every shard with its size and sha256.

    `sets` gives what is said of each set by name (its repeat); read = written + quarantined holds in every
    entry.
    """
    totals: Counter[str] = Counter()
    splits, reasons = Counter(dict.fromkeys(SPLITS, 0)), Counter()
    licenses, origins = Counter(), Counter()
    by_source = {name: {"read": 0, "written": 0, "quarantined": 0, **about} for name, about in sets.items()}
    shards = []
    for content in found:
        facts, num_quarantined = content.facts, len(content.quarantine)
        counts = {"read": facts["read"], "written": facts["samples"], "quarantined": num_quarantined}
        if counts["read"] != counts["written"] + counts["quarantined"]:
            raise RuntimeError(f"{facts['name']}: read {counts['read']} rows but accounts for {counts}")
        totals.update(counts)
        for name, count in counts.items():
            by_source[facts["source"]][name] += count
        totals["tiles"] += sum(content.table["num_tiles"].to_pylist())
        totals["pictures"] += sum(len(tiles) for tiles in content.table["tiles"].to_pylist())
        totals["bytes"] += facts["bytes"]
        splits.update(content.table["split"].to_pylist())
        licenses.update(content.table["license"].to_pylist())
        origins.update(content.table["origin"].to_pylist())
        reasons.update(row["reason"] for row in content.quarantine)
        shards.append({**facts, "quarantined": num_quarantined})
    names = ("read", "written", "quarantined", "pictures", "tiles", "bytes")
    return {
        "schema": MANIFEST_SCHEMA,
        **{name: totals[name] for name in names},
        "splits": dict(splits),
        "reasons": dict(sorted(reasons.items())),
        "licenses": _most_common(licenses),
        "origins": _most_common(origins),
        "sources": by_source,
        "shards": shards,
    }


def _most_common(counts: Counter[str]) -> dict[str, int]:
    """The most frequent values with their samples, the rest as one; "" is what nobody stated."""
    kept = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in kept[_NUM_NAMED:])
    return dict(kept[:_NUM_NAMED]) | ({"other": rest} if rest else {})
