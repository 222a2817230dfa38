"""The Ray tasks of the shard stage: what each needs, and the writing of one shard.

`stages/shard/stage.py` and `stages/shard/repair.py` run them; imported when the stage runs.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.records.blocks import Block
from data_prep.shards.checks import RowRules
from data_prep.shards.folder import write_sidecar
from data_prep.shards.names import kept_sidecar_name, shard_name, sidecar_name, waiting_tar
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from vico.errors import UserError
from vico.prompt import PromptFormat, load_prompt_format

if TYPE_CHECKING:
    from data_prep.records.config import RecordSet
    from stages.context import Context
    from stages.parts import Parts
    from stages.shard.config import ShardConfig


@dataclass(frozen=True)
class ShardTask:
    """What a task needs to write one shard."""

    block: Block
    settings: ShardSettings
    tokenizer: Path
    parts: Parts
    leaked: frozenset[int] | None = None
    """Lines to leave out of the final shard; None: the shard is checked by itself and waits."""


def shard_tasks(
    config: ShardConfig,
    context: Context,
    blocks: list[Block],
    chosen: list[Block],
    leaked: Mapping[int, frozenset[int]] | None = None,
) -> list[ShardTask]:
    """The tasks of the chosen blocks; those with `leaked` lines write the final shard."""
    heldout = any(block.records.heldout for block in blocks)
    return [
        ShardTask(
            block,
            shard_settings(config, block.records, heldout),
            context.inputs["tokenizer"],
            context.parts,
            None if leaked is None else leaked[block.number],
        )
        for block in chosen
    ]


def shard_settings(config: ShardConfig, records: RecordSet, heldout: bool) -> ShardSettings:
    """What holds for the rows of one set."""
    rules = RowRules(
        max_tiles=records.max_tiles or config.max_tiles,
        max_pixels=config.max_pixels,
        max_tokens=config.max_tokens,
        decode=config.verify == "decode",
        system_message=config.system_message,
    )
    test_share = 0.0 if heldout else config.test_share
    return ShardSettings(rules, Shares(config.calib_share, test_share, config.split_seed))


def write_part(task: ShardTask) -> None:
    """One shard: its sidecar is published first, its tar last; a sidecar alone is what a killed task left."""
    parts, number = task.parts, task.block.number
    waits = task.leaked is None
    tar = waiting_tar(number) if waits else shard_name(number)
    sidecar = sidecar_name(number) if waits else kept_sidecar_name(number)
    if parts.done(tar):  # by a task whose worker died before it could say so
        return
    parts.remove(sidecar)
    try:
        tokens = prompt_format(str(task.tokenizer))
        content = write_shard(parts.partial(tar), task.block, task.settings, tokens, task.leaked or ())
        write_sidecar(parts.partial(sidecar), content)
        parts.publish(sidecar, tar)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"storage={parts.output} is full ({error.strerror}); free space and run again"
        ) from None


@lru_cache(maxsize=1)
def prompt_format(tokenizer: str) -> PromptFormat:
    """The prompt format, loaded once a worker process."""
    found = load_prompt_format(tokenizer)
    gc.freeze()  # the collector need not go through all that was imported again and again
    return found
