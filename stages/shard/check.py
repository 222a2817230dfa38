"""What the shard stage would find, without writing anything; `vico data check` calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.site import Site
from stages.shard.config import ShardConfig
from stages.shard.tasks import prompt_format, shard_settings
from vico.errors import UserError

if TYPE_CHECKING:
    from data_prep.records.blocks import Block
    from data_prep.records.config import RecordSet
    from data_prep.shards.write import ShardContent, ShardSettings


_EXAMPLES_PER_REASON = 3


@dataclass(frozen=True)
class CheckTask:
    """One block to be checked."""

    block: Block
    settings: ShardSettings
    tokenizer: Path


def check_records(
    config: ShardConfig,
    sets: list[RecordSet],
    tokenizer: Path,
    site: Site,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Counts by set, split and reason, with the first rows of each reason: `{"read", "written",
    "quarantined", "splits", "reasons", "sources", "examples"}`; `written` is what a build would write.
    """
    from cluster.ray_session import ray_session
    from cluster.tasks import map_tasks
    from data_prep.records.blocks import record_blocks
    from data_prep.shards.leaks import leaked_lines

    blocks = record_blocks(sets, config.samples_per_shard)
    if not blocks:
        raise UserError("inputs.records has no rows; give annotation files with at least one line")
    heldout = any(one.heldout for one in sets)
    tasks = [CheckTask(block, shard_settings(config, block.records, heldout), tokenizer) for block in blocks]
    contents: dict[int, ShardContent] = {}
    num_rows, num_done = sum(block.num_lines for block in blocks), 0
    with ray_session(site):
        for number, content in map_tasks(check_part, tasks, site=site):
            contents[number] = content
            num_done += blocks[number].num_lines
            progress(num_done, num_rows)
    ordered = [contents[number] for number in range(len(blocks))]
    return _report(blocks, ordered, leaked_lines(lambda: ordered))


def check_part(task: CheckTask) -> ShardContent:
    """What one shard would hold, with the columns that the report reads."""
    from data_prep.shards.write import ShardContent, write_shard

    found = write_shard(None, task.block, task.settings, prompt_format(str(task.tokenizer)))
    return ShardContent(found.table.select(["line", "split", "image_sha256"]), found.quarantine, found.facts)


def _report(
    blocks: list[Block], contents: list[ShardContent], leaked: dict[int, frozenset[int]]
) -> dict[str, Any]:
    splits: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    examples: dict[str, list[dict[str, Any]]] = {}
    for number, (block, content) in enumerate(zip(blocks, contents, strict=True)):
        lines = leaked.get(number, frozenset())
        bad = [*content.quarantine, *_leak_rows(block, lines)]
        counts = sources.setdefault(block.records.name, Counter(read=0, written=0, quarantined=0))
        counts.update(read=block.num_lines, written=block.num_lines - len(bad), quarantined=len(bad))
        for line, split in zip(
            content.table["line"].to_pylist(), content.table["split"].to_pylist(), strict=True
        ):
            splits[split] += line not in lines
        for row in bad:
            reasons[row["reason"]] += 1
            if len(examples.setdefault(row["reason"], [])) < _EXAMPLES_PER_REASON:
                examples[row["reason"]].append(row)
    total = sum(sources.values(), Counter(read=0, written=0, quarantined=0))
    return {
        **{name: total[name] for name in ("read", "written", "quarantined")},
        "splits": {name: count for name, count in sorted(splits.items()) if count},
        "reasons": dict(sorted(reasons.items())),
        "sources": {name: dict(counts) for name, counts in sources.items()},
        "examples": dict(sorted(examples.items())),
    }


def _leak_rows(block: Block, lines: frozenset[int]) -> Iterator[dict[str, Any]]:
    from data_prep.shards.write import LEAK_MESSAGE

    for line in sorted(lines):
        source = {"id": None, "source": block.records.name, "line": line}
        yield {**source, "reason": "straddles_split", "message": LEAK_MESSAGE}
