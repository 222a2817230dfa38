"""The shard stage with `inputs.repaired`: new shards for rows that were mended, beside the old ones.

The old tars are not written again: they are linked into the output after their digests were held against
the old manifest. `stages/shard/stage.py` calls it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.records.repairs import Repairs
from vico.errors import UserError

if TYPE_CHECKING:
    from data_prep.records.blocks import Block
    from data_prep.records.config import RecordSet
    from data_prep.records.repairs import RepairBlock
    from data_prep.shards.write import ShardContent
    from stages.context import Context
    from stages.shard.config import ShardConfig


logger = logging.getLogger(__name__)
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


def write_repaired(config: ShardConfig, context: Context, sets: list[RecordSet], blocks: list[Block]) -> None:
    """Shards of the mended rows, the old ones beside them, then index, ledger and, last, the manifest."""
    from data_prep.records.repairs import repair_blocks, repaired_rows
    from data_prep.shards.names import MANIFEST_FILE, QUARANTINE_FILE

    repairs: Repairs = context.inputs["repaired"]
    if not (repairs.base / MANIFEST_FILE).is_file():
        raise UserError(
            f"inputs.repaired={repairs.file} mends the shards {repairs.fingerprint[:12]}, which are not in "
            "this storage; `vico data retry` makes them first"
        )
    base = json.loads((repairs.base / MANIFEST_FILE).read_text(encoding="utf-8"))
    with open(repairs.base / QUARANTINE_FILE, encoding="utf-8") as file:
        ledger = [json.loads(line) for line in file]
    link_shards(context, repairs.base, base["shards"])
    rows = repaired_rows(repairs.file, {(entry["source"], entry["line"]) for entry in ledger})
    again = repair_blocks(rows, sets, blocks, config.samples_per_shard, len(base["shards"]))
    write_again(config, context, blocks, again, repairs.base)
    _write_summary(context, again, repairs, base, ledger, set(rows))


def link_shards(context: Context, base: Path, shards: list[dict[str, Any]]) -> None:
    """The old tars under the same names, each one's bytes held against the manifest; copied where the
    storage has no hard links.
    """
    for number, shard in enumerate(shards):
        context.check()
        context.progress(number, len(shards), "old shards")
        if context.parts.done(shard["name"]):
            continue
        source, partial_path = base / shard["name"], context.parts.partial(shard["name"])
        with open(source, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard["sha256"]:
            raise UserError(
                f"{source} has sha256 {found[:12]}, its manifest says {shard['sha256'][:12]}; fetch it again "
                "or run again with --force shard and without inputs.repaired"
            )
        partial_path.unlink(missing_ok=True)
        try:
            os.link(source, partial_path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            logger.warning("%s is copied, it cannot be linked (%s)", source, error.strerror)
            shutil.copyfile(source, partial_path)
        context.parts.publish(shard["name"])


def write_again(
    config: ShardConfig, context: Context, blocks: list[Block], again: list[RepairBlock], base: Path
) -> None:
    """The tars of the repaired rows and their sidecars. All are checked first, since a row whose picture
    stands on another side of the split, in old shards or new ones, may not be written.
    """
    from cluster.ray_session import ray_session
    from cluster.tasks import map_tasks
    from data_prep.shards.leaks import leaked_lines
    from data_prep.shards.names import shard_name
    from stages.shard.check import CheckTask, check_part
    from stages.shard.tasks import shard_tasks, write_part

    if all(context.parts.done(shard_name(block.number)) for block in again):
        return
    every = shard_tasks(config, context, blocks, list(again))
    checks = [CheckTask(task.block, task.settings, task.tokenizer) for task in every]
    context.progress(0, len(again), "new shards")
    with ray_session(context.site):
        run = partial(map_tasks, site=context.site, check=context.check)
        found: dict[int, ShardContent] = dict(run(check_part, checks))
        contents = [found[number] for number in range(len(again))]
        leaked = {number: set(lines) for number, lines in leaked_lines(lambda: contents).items()}
        for number, lines in enumerate(lines_on_other_sides(contents, base)):
            leaked.setdefault(number, set()).update(lines)
        by_block = {block.number: frozenset(leaked.get(n, ())) for n, block in enumerate(again)}
        tasks = shard_tasks(config, context, blocks, list(again), by_block)
        for done, _ in enumerate(run(write_part, tasks), start=1):
            context.progress(done, len(again), "new shards")


def lines_on_other_sides(contents: list[ShardContent], base: Path) -> list[set[int]]:
    """Lines of each content with a picture that the old shards have on another side; those stay."""
    import pyarrow.parquet as pq

    from data_prep.shards.names import INDEX_FILE

    pictures = {
        digest
        for content in contents
        for digests in content.table["image_sha256"].to_pylist()
        for digest in digests
    }
    sides: dict[bytes, set[str]] = {}
    index = pq.ParquetFile(base / INDEX_FILE)
    for group in range(index.num_row_groups if pictures else 0):
        table = index.read_row_group(group, ["split", "image_sha256"])
        for split, digests in zip(table["split"].to_pylist(), table["image_sha256"].to_pylist(), strict=True):
            for digest in pictures.intersection(digests):
                sides.setdefault(digest, set()).add(split)
    found = []
    for content in contents:
        table = content.table
        rows = zip(*(table[name].to_pylist() for name in ("line", "split", "image_sha256")), strict=True)
        found.append(
            {line for line, split, digests in rows if any(sides.get(d, set()) - {split} for d in digests)}
        )
    return found


def _write_summary(
    context: Context,
    again: list[RepairBlock],
    repairs: Repairs,
    base: dict[str, Any],
    ledger: list[dict[str, Any]],
    tried: set[tuple[str, int]],
) -> None:
    from data_prep.records.repairs import mended_ledger
    from data_prep.shards.folder import read_sidecar, write_index, write_quarantine
    from data_prep.shards.names import INDEX_FILE, MANIFEST_FILE, QUARANTINE_FILE, kept_sidecar_name
    from data_prep.shards.write import ShardContent

    parts = context.parts
    contents = [read_sidecar(parts.output / kept_sidecar_name(block.number)) for block in again]

    def all_contents() -> Iterator[ShardContent]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        index = pq.ParquetFile(repairs.base / INDEX_FILE)
        for group in range(index.num_row_groups):
            yield ShardContent(pa.Table.from_batches([*index.iter_batches(row_groups=[group])]), [], {})
        yield from contents

    write_index(parts.partial(INDEX_FILE), all_contents())
    parts.publish(INDEX_FILE, replace=True)
    still_bad = {(row["source"], row["line"]): row for one in contents for row in one.quarantine}
    mended = mended_ledger(ledger, tried, still_bad)
    write_quarantine(parts.partial(QUARANTINE_FILE), [ShardContent(contents[0].table, mended, {})])
    parts.publish(QUARANTINE_FILE, replace=True)
    parts.write_json(MANIFEST_FILE, repaired_manifest(base, contents, mended, repairs.fingerprint))


def repaired_manifest(
    base: dict[str, Any], contents: list[ShardContent], ledger: list[dict[str, Any]], fingerprint: str
) -> dict[str, Any]:
    """The base's manifest with what was mended: rows were read once, so `read` stays, and written rows leave
    the quarantine. Old shards name the `base` they were written for.
    """
    from data_prep.shards.folder import manifest

    new = manifest(contents, {name: {} for name in base["sources"]})
    written = new["written"]
    found = json.loads(json.dumps(base))
    found["written"] += written
    found["quarantined"] -= written
    for name in ("pictures", "tiles", "bytes"):
        found[name] += new[name]
    for name in ("splits", "licenses", "origins"):
        found[name] = dict(Counter(found[name]) + Counter(new[name])) | {
            key: 0 for key, count in found[name].items() if not count and not new[name].get(key)
        }
    found["reasons"] = dict(sorted(Counter(row["reason"] for row in ledger).items()))
    for name, counts in new["sources"].items():
        found["sources"][name]["written"] += counts["written"]
        found["sources"][name]["quarantined"] -= counts["written"]
    found["shards"] = [{"base": fingerprint, **one} for one in base["shards"]] + new["shards"]
    found["repaired"] = {"base": fingerprint, "tried": new["read"], "written": written}
    if found["read"] != found["written"] + found["quarantined"] or found["quarantined"] != len(ledger):
        raise RuntimeError(f"read {found['read']} rows, wrote {found['written']}, refused {len(ledger)}")
    return found
