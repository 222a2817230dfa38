"""The shard stage: records -> checked samples in WebDataset tars, with index, quarantine ledger and manifest.

One Ray task writes one shard (`stages/shard/tasks.py`); heavy modules are imported when the stage runs.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.shard.config import ShardConfig
from stages.shard.tile_limit import tile_limit_notes
from vico.errors import UserError

if TYPE_CHECKING:
    from data_prep.records.blocks import Block
    from data_prep.records.sets import RecordSet
    from data_prep.shards.picture_sides import PictureSides
    from stages.context import Context
    from stages.parts import Parts


CODE_VERSION = 5
INPUTS = ("records", "heldout", "tokenizer", "repaired")
NEEDS_RAY = True
COUNTS = ("read", "written", "quarantined", "pictures", "tiles", "bytes")
_LARGE_SET = 0.1  # share of rows; a larger set hardly fits into a split of the default size
_DISK_MARGIN = 1.05  # index and ledger, which the estimate leaves out
logger = logging.getLogger(__name__)
Config = ShardConfig


def run(config: ShardConfig, context: Context) -> dict[str, float | int | str]:
    """Write the missing shards, then index, ledger and, last, the manifest; return counts for the record."""
    from data_prep.shards.names import MANIFEST_FILE

    parts = context.parts
    if not parts.done(MANIFEST_FILE):
        from data_prep.records.blocks import record_blocks
        from stages.shard.tasks import check_max_tokens, check_system_message

        sets = all_sets(context)
        for text in tile_limit_notes(config, sets, context.folder("tokenizer")):
            context.note(text)
        check_max_tokens(config, context.folder("tokenizer"))
        check_system_message(config, context.folder("tokenizer"))
        context.progress(0, 1, "rows")
        blocks = record_blocks(sets, config.samples_per_shard, context.check)
        if not blocks:
            raise UserError("inputs.records has no rows; give annotation files with at least one line")
        if context.repaired is not None:
            from stages.shard.repair import write_repaired

            write_repaired(config, context, context.repaired, sets, blocks)
        else:
            write_shards(config, context, blocks)
            settle_shards(config, context, blocks)
            write_summary(parts, len(blocks), sets)
    return finished_counts(parts)


def all_sets(context: Context) -> list[RecordSet]:
    """Return the sets of the records and of the held-out records, if there are any."""
    from data_prep.records.sets import check_slugs, record_sets

    sets = record_sets(context.records)
    if context.heldout is not None:
        sets += record_sets(context.heldout, heldout=True)
        check_slugs(sets)
    return sets


def write_shards(config: ShardConfig, context: Context, blocks: Sequence[Block]) -> None:
    """Write the missing shards, each in a Ray task; they wait for `settle_shards`.

    A task holds one row at a time, so `resources.tasks` limits the bytes in memory.
    """
    from cluster.ray_session import ray_session
    from cluster.tasks import map_tasks
    from data_prep.shards.names import shard_name, waiting_tar
    from stages.shard.tasks import shard_tasks, write_part

    parts = context.parts
    missing = [
        block
        for block in blocks
        if not parts.done(shard_name(block.number)) and not parts.done(waiting_tar(block.number))
    ]
    refuse_small_disk(missing, parts)
    num_rows = sum(block.num_lines for block in blocks)
    num_done = num_rows - sum(block.num_lines for block in missing)
    context.progress(num_done, num_rows, "rows")
    if not missing:
        return
    tasks = shard_tasks(config, context, blocks, missing)
    with ray_session(context.site):
        for number, _ in map_tasks(write_part, tasks, site=context.site, check=context.check):
            num_done += missing[number].num_lines
            context.progress(num_done, num_rows, "rows")


def settle_shards(config: ShardConfig, context: Context, blocks: Sequence[Block]) -> None:
    """Bring rows that share pictures to one side of the split, and give the shards their final names.

    A shard whose rows change side gets a new sidecar. Shards with samples that straddle the split even so are
    rewritten without them.
    """
    from cluster.ray_session import ray_session
    from cluster.tasks import map_tasks
    from data_prep.shards.folder import checked_tables, read_sidecar
    from data_prep.shards.leaks import leaked_lines
    from data_prep.shards.names import shard_name, sidecar_name, waiting_tar
    from data_prep.shards.picture_sides import picture_sides
    from data_prep.shards.write import SplitDecisions
    from stages.shard.tasks import heldout_names, shard_tasks, write_part

    parts = context.parts
    tables = partial(checked_tables, parts.output, len(blocks))
    sides = picture_sides(tables, heldout_names(block.record_set for block in blocks))
    if sides.num_connected > _LARGE_SET * sides.num_rows:
        logger.warning(
            "%d of %d rows are connected by pictures that they share, so they are all in one split",
            sides.num_connected,
            sides.num_rows,
        )
    leaked = leaked_lines(lambda: map(sides.settled, tables()))
    decisions: dict[int, SplitDecisions] = {}
    new_names: dict[str, str] = {}
    for block in blocks:
        context.check()
        if parts.done(shard_name(block.number)):
            continue
        if block.number in leaked:
            table = read_sidecar(parts.output / sidecar_name(block.number)).table
            decisions[block.number] = SplitDecisions(leaked[block.number], sides.moved(table))
            continue
        settle_sidecar(parts, block.number, sides)
        new_names[waiting_tar(block.number)] = shard_name(block.number)
    parts.rename(new_names)
    if decisions:
        logger.warning(
            "%d samples have a picture that is also in another split; they go to quarantine",
            sum(len(lines) for lines in leaked.values()),
        )
        again = [block for block in blocks if block.number in decisions]
        tasks = shard_tasks(config, context, blocks, again, decisions)
        with ray_session(context.site):
            for _ in map_tasks(write_part, tasks, site=context.site, check=context.check):
                pass


def settle_sidecar(parts: Parts, number: int, sides: PictureSides) -> None:
    """Publish a new sidecar of a shard if rows of it change side; remove one that an earlier attempt left."""
    from data_prep.shards.folder import read_sidecar, write_sidecar
    from data_prep.shards.names import kept_sidecar_name, sidecar_name

    kept = kept_sidecar_name(number)
    parts.remove(kept)
    if not len(sides.pictures):
        return
    content = read_sidecar(parts.output / sidecar_name(number))
    settled = sides.settled(content.table)
    if settled is not content.table:
        write_sidecar(parts.partial(kept), replace(content, table=settled))
        parts.publish(kept)


def refuse_small_disk(blocks: Sequence[Block], parts: Parts) -> None:
    """Raise UserError when the storage has less free space than the shards of these blocks will need."""
    from data_prep.records.blocks import estimated_bytes

    parts.output.mkdir(parents=True, exist_ok=True)
    needed, free = int(estimated_bytes(blocks) * _DISK_MARGIN), shutil.disk_usage(parts.output).free
    if needed > free:
        raise UserError(
            f"storage={parts.output} has {free / 1e9:.1f} GB free but the shards need about "
            f"{needed / 1e9:.1f} GB; free space or choose another storage"
        )


def write_summary(parts: Parts, num_shards: int, sets: Sequence[RecordSet]) -> None:
    """Write index.parquet, quarantine.jsonl and, last, manifest.json from the shards' sidecars."""
    from data_prep.shards.folder import contents, manifest, write_tables
    from data_prep.shards.names import INDEX_FILE, MANIFEST_FILE, QUARANTINE_FILE

    index, ledger = parts.partial(INDEX_FILE), parts.partial(QUARANTINE_FILE)
    about = {record_set.name: {"repeat": record_set.repeat} for record_set in sets}
    summary = manifest(write_tables(index, ledger, contents(parts.output, num_shards)), about)
    parts.publish(INDEX_FILE, QUARANTINE_FILE, replace=True)
    parts.write_json(MANIFEST_FILE, summary)


def finished_counts(parts: Parts) -> dict[str, float | int | str]:
    """Return the manifest's counts for the stage's record, and delete the sidecars."""
    from data_prep.shards.names import MANIFEST_FILE, SIDECAR_FOLDER

    manifest: dict[str, Any] = json.loads((parts.output / MANIFEST_FILE).read_text(encoding="utf-8"))
    parts.remove(SIDECAR_FOLDER)
    counts: dict[str, float | int | str] = {name: manifest[name] for name in COUNTS}
    counts |= {f"num_{split}": count for split, count in manifest["splits"].items()}
    counts |= {f"quarantined_{reason}": count for reason, count in manifest["reasons"].items()}
    for split in ("train", "calib", "test"):
        if not manifest["splits"][split]:
            logger.warning("the split %s has no sample", split)
    return {**counts, "shards": len(manifest["shards"])}
