"""Index, ledger and manifest of a shard stage that repaired rows of another one, its base."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.records.repairs import RepairBlock, Repairs, RowAddress, repaired_ledger

if TYPE_CHECKING:
    from data_prep.records.rejection import LedgerRow
    from data_prep.shards.folder import Manifest, ManifestShard
    from data_prep.shards.write import ShardContent
    from stages.parts import Parts


def write_repair_summary(
    parts: Parts,
    again: Sequence[RepairBlock],
    repairs: Repairs,
    base: Manifest,
    ledger: list[LedgerRow],
    tried: set[RowAddress],
) -> None:
    """Write index.parquet, quarantine.jsonl and, last, manifest.json: those of the base plus the new shards.

    `base` and `ledger` are the base's manifest and ledger, `again` the blocks of the rows `tried`.
    """
    from data_prep.shards.folder import read_sidecar, write_index, write_quarantine
    from data_prep.shards.names import INDEX_FILE, MANIFEST_FILE, QUARANTINE_FILE, kept_sidecar_name

    contents = [read_sidecar(parts.output / kept_sidecar_name(block.number)) for block in again]
    tables = all_tables(repairs.base / INDEX_FILE, (content.table for content in contents))
    write_index(parts.partial(INDEX_FILE), tables)
    parts.publish(INDEX_FILE, replace=True)
    still_bad = {
        RowAddress(row["source"], row["line"]): row for content in contents for row in content.quarantine
    }
    new_ledger = repaired_ledger(ledger, tried, still_bad)
    write_quarantine(parts.partial(QUARANTINE_FILE), new_ledger)
    parts.publish(QUARANTINE_FILE, replace=True)
    parts.write_json(MANIFEST_FILE, repaired_manifest(base, contents, new_ledger, repairs.fingerprint))


def all_tables(old_index: Path, new_tables: Iterable[Any]) -> Iterator[Any]:
    """Yield the old index row group by row group, then the new tables.

    An index may be older: `image_sha256` was a list of binary(32).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_prep.shards.index import SCHEMA

    index = pq.ParquetFile(old_index)
    for group in range(index.num_row_groups):
        yield pa.Table.from_batches([*index.iter_batches(row_groups=[group])]).cast(SCHEMA)
    yield from new_tables


def repaired_manifest(
    base: Manifest, contents: Sequence[ShardContent], ledger: Sequence[LedgerRow], fingerprint: str
) -> Manifest:
    """Return the base's manifest with the new shards; its old shards name `fingerprint` as their base.

    `read` stays, because all rows were read before. Rows that are written now leave the quarantine.
    """
    from data_prep.shards.folder import manifest

    new = manifest(contents, {name: {} for name in base["sources"]})
    written = new["written"]
    result = copy.deepcopy(base)
    result["written"] += written
    result["quarantined"] -= written
    result["pictures"] += new["pictures"]
    result["tiles"] += new["tiles"]
    result["bytes"] += new["bytes"]
    result["splits"] = _summed(base["splits"], new["splits"])
    result["licenses"] = _summed(base["licenses"], new["licenses"])
    result["origins"] = _summed(base["origins"], new["origins"])
    result["reasons"] = dict(sorted(Counter(row["reason"] for row in ledger).items()))
    for name, counts in new["sources"].items():
        result["sources"][name]["written"] += counts["written"]
        result["sources"][name]["quarantined"] -= counts["written"]
    old_shards: list[ManifestShard] = [{"base": fingerprint, **shard} for shard in base["shards"]]
    result["shards"] = old_shards + new["shards"]
    result["repaired"] = {"base": fingerprint, "tried": new["read"], "written": written}
    num_read, num_written, num_bad = result["read"], result["written"], result["quarantined"]
    if num_read != num_written + num_bad or num_bad != len(ledger):
        raise RuntimeError(f"read {num_read} rows, wrote {num_written}, quarantined {len(ledger)}")
    return result


def _summed(old: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    """Return the sums by name; names that the base counts as 0 are kept."""
    zeros = {name: 0 for name, count in old.items() if not count and not new.get(name)}
    return dict(Counter(old) + Counter(new)) | zeros
