"""Plans over the files of a cache folder: columns of the split, and the summary of each epoch, built once."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.packs.column_files import column_files
from data_prep.packs.plan import PackPlan, PlanSummary
from data_prep.shards.index import ShardIndex
from data_prep.shards.names import INDEX_FILE


def cached_plan(
    shard_folder: Path, split: str, cache: Path, index: ShardIndex | None = None, **settings: Any
) -> PackPlan:
    """The PackPlan of `settings` (its keywords) over a split, opened with the summary in `cache`.

    The first call writes columns and summary; names hold the state of the index and all settings, so what
    is found always fits. `index` names samples in messages.
    """
    columns = column_files(shard_folder / INDEX_FILE, split, cache, index)
    named = json.dumps([columns.folder.name, _SUMMARY_SCHEMA, settings], sort_keys=True)
    path = cache / f"summary-{hashlib.sha256(named.encode()).hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path) as found:
            summary = PlanSummary(found["shard_entries"], found["packs_per_window"])
        return PackPlan(columns, summary=summary, **settings)
    plan = PackPlan(columns, **settings)
    partial = cache / f".{path.name}.partial-{os.getpid()}"
    with open(partial, "wb") as file:
        np.savez(
            file, shard_entries=plan.summary.shard_entries, packs_per_window=plan.summary.packs_per_window
        )
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return plan


_SUMMARY_SCHEMA = 1  # raised when the way from columns to packs changes
