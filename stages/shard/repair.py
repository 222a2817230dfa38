"""The shard stage with `inputs.repaired`: new shards for the repaired rows, beside the old shards.

The old tars are not written again: their digests are compared with the old manifest, then they are linked
into the output. `stages/shard/stage.py` calls this.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.records.repairs import Repairs
from stages.shard.repair_summary import write_repair_summary
from vico.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from data_prep.records.blocks import Block
    from data_prep.records.repairs import RepairBlock
    from data_prep.records.sets import RecordSet
    from data_prep.shards.folder import Manifest, ManifestShard
    from data_prep.shards.write import ShardContent, SplitDecisions
    from stages.context import Context
    from stages.shard.config import ShardConfig


logger = logging.getLogger(__name__)
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


def write_repaired(
    config: ShardConfig, context: Context, repairs: Repairs, sets: list[RecordSet], blocks: list[Block]
) -> None:
    """Link the old shards, write shards of the repaired rows, then index, ledger and, last, the manifest.

    `blocks` are the blocks of the records. Raises UserError when the base is not in this storage, when one of
    its tars was changed, or when the file of repaired rows is wrong.
    """
    from data_prep.records.repairs import RowAddress, repair_blocks, repaired_rows
    from data_prep.shards.names import MANIFEST_FILE, QUARANTINE_FILE

    if not (repairs.base / MANIFEST_FILE).is_file():
        raise UserError(
            f"inputs.repaired={repairs.file} repairs the shards {repairs.fingerprint[:12]}, which are not in "
            "this storage; run `vico data retry`, which writes them first"
        )
    base: Manifest = json.loads((repairs.base / MANIFEST_FILE).read_text(encoding="utf-8"))
    with open(repairs.base / QUARANTINE_FILE, encoding="utf-8") as file:
        ledger = [json.loads(line) for line in file]
    link_shards(context, repairs.base, base["shards"])
    rows = repaired_rows(repairs.file, {RowAddress(row["source"], row["line"]) for row in ledger})
    again = repair_blocks(rows, sets, blocks, config.samples_per_shard, len(base["shards"]))
    write_again(config, context, blocks, again, repairs.base)
    write_repair_summary(context.parts, again, repairs, base, ledger, set(rows))


def link_shards(context: Context, base: Path, shards: Sequence[ManifestShard]) -> None:
    """Link the old tars under their names after comparing each with the manifest.

    They are copied when the storage has no hard links. Raises UserError when a tar was changed.
    """
    from data_prep.records.identity import file_sha256

    for number, shard in enumerate(shards):
        context.check()
        context.progress(number, len(shards), "old shards")
        if context.parts.done(shard["name"]):
            continue
        source, partial_path = base / shard["name"], context.parts.partial(shard["name"])
        sha256 = file_sha256(source)
        if sha256 != shard["sha256"]:
            raise UserError(
                f"{source} has sha256 {sha256[:12]}, its manifest says {shard['sha256'][:12]}; "
                "fetch it again or run again with --force shard and without inputs.repaired"
            )
        partial_path.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(source), partial_path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            logger.warning("%s is copied because it cannot be linked (%s)", source, error.strerror)
            shutil.copyfile(source, partial_path)
        context.parts.publish(shard["name"])


def write_again(
    config: ShardConfig, context: Context, blocks: list[Block], again: list[RepairBlock], base: Path
) -> None:
    """Write the tars of the repaired rows and their sidecars.

    All rows are checked first: a row takes the side of the old samples that share its pictures, and must not
    be written if one of its pictures is in another split all the same.
    """
    from cluster.ray_session import ray_session
    from cluster.tasks import map_tasks
    from data_prep.shards.names import INDEX_FILE, shard_name
    from stages.shard.check import CheckTask, check_part
    from stages.shard.tasks import heldout_names, shard_tasks, write_part

    if all(context.parts.done(shard_name(block.number)) for block in again):
        return
    checks = [
        CheckTask(task.block, task.settings, task.tokenizer)
        for task in shard_tasks(config, context, blocks, again)
    ]
    context.progress(0, len(again), "new shards")
    with ray_session(context.site):
        contents: dict[int, ShardContent] = dict(
            map_tasks(check_part, checks, site=context.site, check=context.check)
        )
        tables = [contents[number].table for number in range(len(again))]
        decisions = repair_decisions(
            tables, base / INDEX_FILE, heldout_names(block.record_set for block in blocks)
        )
        by_block = {block.number: decision for block, decision in zip(again, decisions, strict=True)}
        tasks = shard_tasks(config, context, blocks, again, by_block)
        written = map_tasks(write_part, tasks, site=context.site, check=context.check)
        for done, _ in enumerate(written, start=1):
            context.progress(done, len(again), "new shards")


def repair_decisions(
    tables: Sequence[pa.Table], index_path: Path, heldout: frozenset[str]
) -> list[SplitDecisions]:
    """Return the decisions for the repaired rows of each table, given the written index of the old shards."""
    from data_prep.shards.leaks import leaked_lines, lines_in_other_splits
    from data_prep.shards.picture_sides import picture_sides, written_sides
    from data_prep.shards.write import SplitDecisions

    sides = picture_sides(lambda: tables, heldout, written_sides(tables, index_path, heldout))
    settled = [sides.settled(table) for table in tables]
    among_themselves = leaked_lines(lambda: settled)
    with_old = lines_in_other_splits(settled, index_path)
    return [
        SplitDecisions(among_themselves.get(number, frozenset()) | with_old[number], sides.moved(table))
        for number, table in enumerate(tables)
    ]
