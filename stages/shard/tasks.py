"""The Ray tasks of the shard stage: the input of each, and the writing of one shard.

`stages/shard/stage.py` and `stages/shard/repair.py` run them and import this when the stage runs.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.records.blocks import Block
from data_prep.shards.checks import RowRules
from data_prep.shards.folder import write_sidecar
from data_prep.shards.names import kept_sidecar_name, shard_name, sidecar_name, waiting_tar
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, SplitDecisions, write_shard
from vico.errors import UserError
from vico.model_files import sequence_limit
from vico.prompt import PromptFormat, load_prompt_format
from vico.turn_tokenizer import SpelledToken

if TYPE_CHECKING:
    from data_prep.records.sets import RecordSet
    from stages.context import Context
    from stages.parts import Parts
    from stages.shard.config import ShardConfig


@dataclass(frozen=True)
class ShardTask:
    """The input of a task that writes one shard."""

    block: Block
    settings: ShardSettings
    tokenizer: Path
    parts: Parts
    decisions: SplitDecisions | None = None
    """Those for the final shard; None: the shard is checked by itself and then waits."""


def shard_tasks(
    config: ShardConfig,
    context: Context,
    blocks: Sequence[Block],
    chosen: Sequence[Block],
    decisions: Mapping[int, SplitDecisions] | None = None,
) -> list[ShardTask]:
    """Return the tasks of the chosen blocks. With `decisions` per block they write the final shards."""
    heldout = any(block.record_set.heldout for block in blocks)
    return [
        ShardTask(
            block,
            shard_settings(config, block.record_set, heldout),
            context.folder("tokenizer"),
            context.parts,
            None if decisions is None else decisions[block.number],
        )
        for block in chosen
    ]


def heldout_names(sets: Iterable[RecordSet]) -> frozenset[str]:
    """Return the names of the held-out sets."""
    return frozenset(record_set.name for record_set in sets if record_set.heldout)


def shard_settings(config: ShardConfig, record_set: RecordSet, heldout: bool) -> ShardSettings:
    """Return the settings for the rows of one set; `heldout`: whether there are held-out records."""
    rules = RowRules(
        max_tiles=record_set.max_tiles or config.max_tiles,
        max_pixels=config.max_pixels,
        max_tokens=config.max_tokens,
        decode=config.verify == "decode",
        system_message=config.system_message,
        mark_first=record_set.mark_first,
    )
    return ShardSettings(rules, split_shares(config, heldout=heldout))


def split_shares(config: ShardConfig, *, heldout: bool) -> Shares:
    """Return the shares of the splits; with held-out records, which are the test split, no other rows are."""
    return Shares(config.calib_share, 0.0 if heldout else config.test_share, config.split_seed)


def check_max_tokens(config: ShardConfig, model: Path) -> None:
    """Raise UserError if samples may be so long that they change the model's rotary frequencies."""
    limit = sequence_limit(model)
    if limit is not None and config.max_tokens > limit:
        raise UserError(
            f"shard.max_tokens={config.max_tokens} is more than {limit}, beyond which the model's rotary "
            f"scaling depends on the other samples of a pack; set it to {limit} or less"
        )


def check_system_message(config: ShardConfig, tokenizer: Path) -> None:
    """Raise UserError if `system_message` spells a token of the tokenizer that only the prompt may write.

    Every row without a system message of its own would be rejected for it.
    """
    if not config.system_message:
        return
    try:
        load_prompt_format(tokenizer).num_tokens([{"from": "system", "value": config.system_message}], [])
    except SpelledToken as error:
        raise UserError(
            f"shard.system_message={config.system_message[:60]!r} spells {error.token}, which only the "
            "prompt may write; leave it out"
        ) from None


def write_part(task: ShardTask) -> None:
    """Write one shard. Its sidecar is published before its tar, so a killed task may leave only a sidecar."""
    parts, number = task.parts, task.block.number
    waits = task.decisions is None
    tar = waiting_tar(number) if waits else shard_name(number)
    sidecar = sidecar_name(number) if waits else kept_sidecar_name(number)
    if parts.done(tar):  # a task wrote it whose worker died before it could report that
        return
    parts.remove(sidecar)
    try:
        tokens = prompt_format(str(task.tokenizer))
        content = write_shard(parts.partial(tar), task.block, task.settings, tokens, task.decisions)
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
    """Return the prompt format, loaded once per worker process."""
    loaded = load_prompt_format(tokenizer)
    gc.freeze()  # spares the garbage collector all that was imported
    return loaded
