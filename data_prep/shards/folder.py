"""The output folder of the shard stage: sidecars of single shards, then index, ledger and manifest from them.

A shard's sidecar has its rows of the index, with ledger rows and manifest entry in the file's metadata. It is
written before its tar, both into `sidecars/`. When all sidecars are there, it is known which side rows
that share pictures have, and which samples straddle the split all the same. A shard without any is renamed to
its final name, after a new sidecar (`.kept`) if rows of it changed side. A shard with some is rewritten
without them, its new sidecar first. A shard is complete when its tar has its
final name. The sidecars are deleted after the manifest, which is written last.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NotRequired, Self, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records.rejection import LedgerRow
from data_prep.shards.index import SCHEMA
from data_prep.shards.leaks import SPLIT_COLUMNS
from data_prep.shards.names import kept_sidecar_name, shard_name, sidecar_name
from data_prep.shards.split import SPLITS
from data_prep.shards.write import ShardContent, ShardEntry
from vico.errors import UserError

MANIFEST_SCHEMA = 2
_META_KEY = b"vico.shard"
_ROWS_PER_GROUP = 16_384
_NUM_NAMED = 50  # licenses and origins that the manifest names


class ManifestShard(ShardEntry):
    """A shard in the manifest; `base` is the fingerprint of the shard stage that wrote it, if another one."""

    quarantined: int
    base: NotRequired[str]


class RepairCounts(TypedDict):
    """In the manifest of repaired shards: fingerprint of the base, numbers of rows tried and written."""

    base: str
    tried: int
    written: int


class Manifest(TypedDict):
    """The content of `manifest.json`; read = written + quarantined in total, per source and per shard."""

    schema: int
    read: int
    written: int
    quarantined: int
    pictures: int
    tiles: int
    bytes: int
    splits: dict[str, int]
    reasons: dict[str, int]
    licenses: dict[str, int]
    origins: dict[str, int]
    sources: dict[str, dict[str, float]]
    shards: list[ManifestShard]
    repaired: NotRequired[RepairCounts]


def write_sidecar(path: Path, content: ShardContent) -> None:
    """Write everything of a shard except its tar to one file."""
    about = {"facts": content.entry, "quarantine": content.quarantine}
    metadata = {**SCHEMA.metadata, _META_KEY: json.dumps(about, ensure_ascii=False).encode()}
    pq.write_table(content.table.replace_schema_metadata(metadata), path)


def read_sidecar(path: Path) -> ShardContent:
    with pq.ParquetFile(path) as file:  # pq.read_table takes four times as long to start
        table = file.read()
    about = json.loads(table.schema.metadata[_META_KEY])
    return ShardContent(table.replace_schema_metadata(SCHEMA.metadata), about["quarantine"], about["facts"])


def checked_tables(folder: Path, num_shards: int) -> Iterator[pa.Table]:
    """Yield the rows of all shards in order, as each was checked by itself: the columns of the split."""
    for number in range(num_shards):
        with pq.ParquetFile(folder / sidecar_name(number)) as file:
            yield file.read([*SPLIT_COLUMNS])


def contents(folder: Path, num_shards: int) -> Iterator[ShardContent]:
    """Yield the contents of all shards in order. Raises UserError when the size of a tar has changed."""
    for number in range(num_shards):
        kept = folder / kept_sidecar_name(number)
        content = read_sidecar(kept if kept.exists() else folder / sidecar_name(number))
        tar = folder / shard_name(number)
        num_bytes, num_written = tar.stat().st_size, content.entry["bytes"]
        if num_bytes != num_written:
            raise UserError(
                f"{tar} has {num_bytes} bytes but was written with {num_written}; "
                "run again with --force shard"
            )
        yield content


class IndexWriter:
    """Writes index.parquet, as a context manager, from the rows of each shard in order.

    Row groups have equal sizes. Little more than one is in memory at a time.
    """

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA)
        self._waiting = SCHEMA.empty_table()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None and len(self._waiting):
            self._writer.write_table(self._waiting.combine_chunks())
        self._writer.close()

    def add(self, table: pa.Table) -> None:
        waiting = pa.concat_tables([self._waiting, table])
        while len(waiting) >= _ROWS_PER_GROUP:
            self._writer.write_table(waiting.slice(0, _ROWS_PER_GROUP).combine_chunks())
            waiting = waiting.slice(_ROWS_PER_GROUP)
        self._waiting = waiting


def write_index(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write index.parquet from the rows of each shard in order."""
    with IndexWriter(path) as index:
        for table in tables:
            index.add(table)


def write_tables(index: Path, ledger: Path, shard_contents: Iterable[ShardContent]) -> Iterator[ShardContent]:
    """Write index.parquet and quarantine.jsonl from the contents of all shards in order, and yield them.

    Both files are complete when the iteration is at its end.
    """
    with IndexWriter(index) as rows, open(ledger, "w", encoding="utf-8") as file:
        for content in shard_contents:
            rows.add(content.table)
            file.writelines(_ledger_lines(content.quarantine))
            yield content


def write_quarantine(path: Path, rows: Iterable[LedgerRow]) -> None:
    """Write quarantine.jsonl: one JSON object per line, in the order of the records."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(_ledger_lines(rows))


def _ledger_lines(rows: Iterable[LedgerRow]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def manifest(shard_contents: Iterable[ShardContent], sets: Mapping[str, Mapping[str, float]]) -> Manifest:
    """Return totals, totals by set and by reason, and every shard with its size and sha256.

    `sets` gives what the manifest says about each set by name (its repeat).
    """
    totals: Counter[str] = Counter()
    splits: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
    reasons, licenses, origins = Counter[str](), Counter[str](), Counter[str]()
    sources: dict[str, dict[str, float]] = {
        name: {"read": 0, "written": 0, "quarantined": 0, **about} for name, about in sets.items()
    }
    shards: list[ManifestShard] = []
    for content in shard_contents:
        entry, table, num_quarantined = content.entry, content.table, len(content.quarantine)
        counts = {"read": entry["read"], "written": entry["samples"], "quarantined": num_quarantined}
        if counts["read"] != counts["written"] + counts["quarantined"]:
            raise RuntimeError(f"{entry['name']}: read {counts['read']} rows but accounts for {counts}")
        totals.update(counts)
        for name, count in counts.items():
            sources[entry["source"]][name] += count
        totals["tiles"] += sum(table["num_tiles"].to_pylist())
        totals["pictures"] += sum(len(tiles) for tiles in table["tiles"].to_pylist())
        totals["bytes"] += entry["bytes"]
        splits.update(table["split"].to_pylist())
        licenses.update(table["license"].to_pylist())
        origins.update(table["origin"].to_pylist())
        reasons.update(row["reason"] for row in content.quarantine)
        shards.append({**entry, "quarantined": num_quarantined})
    return {
        "schema": MANIFEST_SCHEMA,
        "read": totals["read"],
        "written": totals["written"],
        "quarantined": totals["quarantined"],
        "pictures": totals["pictures"],
        "tiles": totals["tiles"],
        "bytes": totals["bytes"],
        "splits": dict(splits),
        "reasons": dict(sorted(reasons.items())),
        "licenses": _most_common(licenses),
        "origins": _most_common(origins),
        "sources": sources,
        "shards": shards,
    }


def _most_common(counts: Counter[str]) -> dict[str, int]:
    """Return the most frequent values with their numbers of samples, the rest as "other"; "" is unstated."""
    ordered = sorted(counts.items(), key=lambda value_count: (-value_count[1], value_count[0]))
    rest = sum(count for _, count in ordered[_NUM_NAMED:])
    return dict(ordered[:_NUM_NAMED]) | ({"other": rest} if rest else {})
