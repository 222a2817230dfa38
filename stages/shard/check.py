"""The check of records: what the shard stage would find, without writing anything; for `vico data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from cluster.site import Site
from stages.shard.config import ShardConfig
from stages.shard.tasks import (
    check_max_tokens,
    check_system_message,
    heldout_names,
    prompt_format,
    shard_settings,
)
from stages.shard.tile_limit import tile_limit_notes
from vico.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from data_prep.records.blocks import Block
    from data_prep.records.rejection import LedgerRow
    from data_prep.records.sets import RecordSet
    from data_prep.shards.write import ShardContent, ShardSettings


_EXAMPLES_PER_REASON = 3


class CheckReport(TypedDict):
    """Numbers of rows in total and by split, reason and set; `examples` are the first ledger rows per reason.

    `written` is what a build would write. `notes` are lines about settings that have no full effect.
    """

    read: int
    written: int
    quarantined: int
    splits: dict[str, int]
    reasons: dict[str, int]
    sources: dict[str, dict[str, int]]
    examples: dict[str, list[LedgerRow]]
    notes: list[str]


@dataclass(frozen=True)
class CheckTask:
    """One block to check."""

    block: Block
    settings: ShardSettings
    tokenizer: Path


@dataclass(frozen=True)
class CheckedBlock:
    """What the driver keeps of a block: numbers of bad rows and the first of each reason, and the good rows'
    columns that decide the split. All bad rows of many millions would not fit into its memory.
    """

    reasons: dict[str, int]
    examples: dict[str, list[LedgerRow]]
    table: pa.Table


def check_records(
    config: ShardConfig,
    sets: list[RecordSet],
    tokenizer: Path,
    site: Site,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckReport:
    """Check all rows in Ray tasks and return the counts, with the first rows of each reason.

    `progress` gets the numbers of rows checked and in all. Raises UserError when there are no rows.
    """
    from cluster.ray_session import ray_session
    from cluster.tasks import map_tasks
    from data_prep.records.blocks import record_blocks
    from data_prep.shards.leaks import leaked_lines
    from data_prep.shards.picture_sides import picture_sides

    check_max_tokens(config, tokenizer)
    check_system_message(config, tokenizer)
    blocks = record_blocks(sets, config.samples_per_shard)
    if not blocks:
        raise UserError("inputs.records has no rows; give annotation files with at least one line")
    heldout = heldout_names(sets)
    tasks = [
        CheckTask(block, shard_settings(config, block.record_set, bool(heldout)), tokenizer)
        for block in blocks
    ]
    contents: dict[int, CheckedBlock] = {}
    num_rows, num_done = sum(block.num_lines for block in blocks), 0
    with ray_session(site):
        for number, content in map_tasks(check_block, tasks, site=site):
            contents[number] = content
            num_done += blocks[number].num_lines
            progress(num_done, num_rows)
    ordered = [contents[number] for number in range(len(blocks))]
    sides = picture_sides(lambda: (content.table for content in ordered), heldout)
    settled = [replace(content, table=sides.settled(content.table)) for content in ordered]
    report = _report(blocks, settled, leaked_lines(lambda: (content.table for content in settled)))
    return {**report, "notes": tile_limit_notes(config, sets, tokenizer)}


def check_block(task: CheckTask) -> CheckedBlock:
    """Check a block as `check_part` does, and return what the report needs."""
    content = check_part(task)
    return CheckedBlock(*_counted(content.quarantine), content.table)


def _counted(bad: Iterable[LedgerRow]) -> tuple[dict[str, int], dict[str, list[LedgerRow]]]:
    """Return the numbers of rows by reason, and the first rows of each reason."""
    reasons = Counter[str]()
    examples: dict[str, list[LedgerRow]] = {}
    for row in bad:
        reasons[row["reason"]] += 1
        if reasons[row["reason"]] <= _EXAMPLES_PER_REASON:
            examples.setdefault(row["reason"], []).append(row)
    return dict(reasons), examples


def check_part(task: CheckTask) -> ShardContent:
    """Return the content of one shard without writing it, with the columns that decide the split."""
    from data_prep.shards.leaks import SPLIT_COLUMNS
    from data_prep.shards.write import write_shard

    content = write_shard(None, task.block, task.settings, prompt_format(str(task.tokenizer)))
    return replace(content, table=content.table.select([*SPLIT_COLUMNS]))


def _report(
    blocks: Sequence[Block], contents: Sequence[CheckedBlock], leaked: dict[int, frozenset[int]]
) -> CheckReport:
    splits, reasons = Counter[str](), Counter[str]()
    sources: dict[str, Counter[str]] = {}
    examples: dict[str, list[LedgerRow]] = {}
    for number, (block, content) in enumerate(zip(blocks, contents, strict=True)):
        lines = leaked.get(number, frozenset())
        num_bad = sum(content.reasons.values()) + len(lines)
        counts = sources.setdefault(block.record_set.name, Counter(read=0, written=0, quarantined=0))
        counts.update(read=block.num_lines, written=block.num_lines - num_bad, quarantined=num_bad)
        for line, split in zip(
            content.table["line"].to_pylist(), content.table["split"].to_pylist(), strict=True
        ):
            splits[split] += line not in lines
        of_leaks, leak_examples = _counted(_leak_rows(block, lines))
        reasons.update(content.reasons)
        reasons.update(of_leaks)
        for reason, rows in (*content.examples.items(), *leak_examples.items()):
            first = examples.setdefault(reason, [])
            first += rows[: _EXAMPLES_PER_REASON - len(first)]
    total = sum(sources.values(), Counter(read=0, written=0, quarantined=0))
    return {
        "read": total["read"],
        "written": total["written"],
        "quarantined": total["quarantined"],
        "splits": {name: count for name, count in sorted(splits.items()) if count},
        "reasons": dict(sorted(reasons.items())),
        "sources": {name: dict(counts) for name, counts in sources.items()},
        "examples": dict(sorted(examples.items())),
        "notes": [],
    }


def _leak_rows(block: Block, lines: frozenset[int]) -> Iterator[LedgerRow]:
    from data_prep.shards.write import LEAK_MESSAGE

    for line in sorted(lines):
        yield {
            "id": None,
            "source": block.record_set.name,
            "line": line,
            "reason": "straddles_split",
            "message": LEAK_MESSAGE,
        }
