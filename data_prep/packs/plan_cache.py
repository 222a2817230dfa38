"""Plans over the files of a cache folder: columns of a split and summary of each epoch, built once."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.packs.column_files import column_files
from data_prep.packs.plan import PackPlan, PlanSettings, PlanSummary
from data_prep.shards.index import ShardIndex
from data_prep.shards.names import INDEX_FILE

_SUMMARY_SCHEMA = 2  # raised when the computation from columns to packs changes


def cached_plan(
    shard_folder: Path, split: str, cache: Path, settings: PlanSettings, index: ShardIndex | None = None
) -> PackPlan:
    """Return the plan of a split, opened with the summary in `cache`.

    The first call writes columns and summary. Their names contain the state of the index and all settings,
    so a cached file always matches. `index` names samples in messages.
    """
    columns = column_files(shard_folder / INDEX_FILE, split, cache, index)
    path = cache / _summary_name(columns.folder.name, settings)
    if path.is_file():
        with np.load(path) as arrays:
            summary = PlanSummary(arrays["shard_entries"], arrays["packs_per_window"])
        return PackPlan(columns, settings, summary)
    plan = PackPlan(columns, settings)
    partial = cache / f".{path.name}.partial-{os.getpid()}"
    with open(partial, "wb") as file:
        np.savez(
            file, shard_entries=plan.summary.shard_entries, packs_per_window=plan.summary.packs_per_window
        )
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return plan


def _summary_name(columns_name: str, settings: PlanSettings) -> str:
    named = {
        **asdict(settings.budget),
        "packs_per_step": settings.packs_per_step,
        "seed": settings.seed,
        "epoch": settings.epoch,
        "window_samples": settings.window_samples,
        "rate_unit": settings.rates.unit,
        "compress_share": settings.rates.compress_share,
    }
    text = json.dumps([columns_name, _SUMMARY_SCHEMA, named], sort_keys=True)
    return f"summary-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
