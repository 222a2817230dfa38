"""The check that the shards hold what the stages of a run need, before the first of them starts.

A split without pictures would otherwise be noticed only by the stage that needs it, after the training.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.graph import JOINT, block_path
from pipeline.config.pipeline_file import PipelineConfig
from pipeline.config.split_needs import SplitNeed, split_needs
from stages.evaluate.config import EvaluateConfig
from stages.outputs import LABELS_FILE, RATIOS_FILE
from stages.shard.config import ShardConfig
from vico.errors import UserError

_MOST_ROWS_TO_TRY = 5000
"""Most samples for which other seeds of the split are tried; with more, an empty split has other reasons."""


_LABELLED_BY = {"label": LABELS_FILE, "ratio": RATIOS_FILE}
"""What decides which tiles the router has labels of; the first stage that is adopted."""


@dataclass(frozen=True)
class SplitCounts:
    """Numbers of samples of a split: all, those with a picture, those with a picture and an answer."""

    samples: int = 0
    with_pictures: int = 0
    usable: int = 0


def check_shards(config: PipelineConfig, stages: Collection[str], shard_folder: Path) -> None:
    """Raise UserError if one of the stages needs a sample with a picture and an answer in a split, and the
    shards have none, or if adopted labels or ratios are not of these shards."""
    needs = split_needs(config, stages)
    if not needs:
        return
    counts = split_counts(shard_folder)
    for need in needs:
        if not counts[need.split].usable:
            remedy = _remedy(config, shard_folder, needs, counts, need)
            raise UserError(
                f"not started, because {need.stage} needs {need.split} samples with a picture and an answer "
                f"{need.purpose}, and the shards have none; {remedy}{_quarantined(shard_folder)}"
            )
    _check_choice_of_test_samples(config, stages, shard_folder)
    _check_adopted_tiles(config, needs, shard_folder)


def split_counts(shard_folder: Path) -> dict[str, SplitCounts]:
    """Return the counts of each split, from one pass over the index that keeps none of its rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from data_prep.shards.names import INDEX_FILE
    from data_prep.shards.split import SPLITS

    totals = {split: [0, 0, 0] for split in SPLITS}
    with pq.ParquetFile(shard_folder / INDEX_FILE) as index:
        for batch in index.iter_batches(columns=["split", "num_tiles", "answer_tokens"]):
            has_pictures = pc.greater(batch["num_tiles"], 0)
            is_usable = pc.and_(has_pictures, pc.greater(batch["answer_tokens"], 0))
            for split, numbers in totals.items():
                is_here = pc.equal(batch["split"], split)
                for n, condition in enumerate((is_here, has_pictures, is_usable)):
                    numbers[n] += pc.sum(pc.and_(is_here, condition)).as_py() or 0
    return {split: SplitCounts(*numbers) for split, numbers in totals.items()}


@dataclass(frozen=True)
class TrainSize:
    """An epoch of the train split: its text tokens and tiles, each sample as often as it is repeated."""

    text_tokens: float
    tiles: float


def train_size(shard_folder: Path) -> TrainSize | None:
    """Return the size of the train split; None if the index is not on this machine."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from data_prep.shards.names import INDEX_FILE

    path = shard_folder / INDEX_FILE
    if not path.is_file():
        return None
    names, totals = ("text_tokens", "num_tiles"), [0.0, 0.0]
    with pq.ParquetFile(path) as index:
        for batch in index.iter_batches(columns=["split", "repeat", *names]):
            weights = pc.if_else(pc.equal(batch["split"], "train"), batch["repeat"], 0.0)
            for n, name in enumerate(names):
                totals[n] += pc.sum(pc.multiply(weights, batch[name])).as_py() or 0.0
    return TrainSize(*totals)


def _remedy(
    config: PipelineConfig,
    shard_folder: Path,
    needs: Sequence[SplitNeed],
    counts: Mapping[str, SplitCounts],
    need: SplitNeed,
) -> str:
    """Return what to change, which depends on why there is none."""
    inputs, num_usable = config.inputs, sum(count.usable for count in counts.values())
    if not any(count.samples for count in counts.values()):
        return "repair the rows, or give other inputs.records"
    if not any(count.with_pictures for count in counts.values()):
        return "no row has a picture: give inputs.records with pictures, in a form that docs/data.md lists"
    if not num_usable:
        return "no row with a picture has an answer to learn: give inputs.records with answers"
    if "shard" in inputs.adopt:
        return f"inputs.adopt.shard={inputs.adopt['shard']} lacks them: adopt other shards"
    if need.split == "test" and inputs.heldout is not None:
        return "give inputs.heldout rows with pictures and answers"
    return _other_split(config, shard_folder, {need.split for need in needs}, num_usable, need)


def _quarantined(shard_folder: Path) -> str:
    """Return a clause about quarantined rows, if there are any."""
    from data_prep.shards.names import MANIFEST_FILE, QUARANTINE_FILE

    number = json.loads((shard_folder / MANIFEST_FILE).read_text(encoding="utf-8"))["quarantined"]
    return f" ({number} rows are in {shard_folder / QUARANTINE_FILE}, with reasons)" if number else ""


def _other_split(
    config: PipelineConfig, shard_folder: Path, needed: set[str], num_usable: int, need: SplitNeed
) -> str:
    """Return the remedy if there are usable samples, all in other splits."""
    shard = config.stage("shard")
    assert isinstance(shard, ShardConfig)
    change = f"raise shard.{need.split}_share"
    if need.split == "train":
        change = "lower shard.calib_share and shard.test_share"
    seed = None
    if num_usable <= _MOST_ROWS_TO_TRY and not config.inputs.repaired:
        seed = _seed_that_helps(config, shard, shard_folder, needed)
        if seed is None:
            return (
                f"the {num_usable} such samples are too few, or share too many pictures and groups, for "
                f"{len(needed)} splits: give more records"
            )
    other_seed = "" if seed is None else f"set shard.split_seed: {seed}, which puts some into each split, "
    return f"{other_seed}{change}, or give more such samples than {num_usable}"


def _seed_that_helps(
    config: PipelineConfig, shard: ShardConfig, shard_folder: Path, needed: set[str]
) -> int | None:
    from data_prep.records.sets import record_sets
    from data_prep.shards.index import load_index
    from stages.shard.other_seed import INDEX_COLUMNS, split_seed_with
    from stages.shard.tasks import heldout_names, split_shares

    heldout = config.inputs.heldout
    names = heldout_names([] if heldout is None else record_sets(heldout, heldout=True))
    index = load_index(shard_folder).table(INDEX_COLUMNS)
    return split_seed_with(index, split_shares(shard, heldout=bool(names)), names, needed)


def _check_choice_of_test_samples(
    config: PipelineConfig, stages: Collection[str], shard_folder: Path
) -> None:
    """Raise UserError if the test samples that evaluate draws have no picture."""
    if "evaluate" not in stages or "evaluate" in config.inputs.adopt:
        return
    evaluate = config.stage("evaluate")
    assert isinstance(evaluate, EvaluateConfig)
    if not evaluate.max_samples:
        return
    import numpy as np
    import pyarrow.compute as pc

    from data_prep.draws import chosen_rows
    from data_prep.shards.index import load_index

    table = load_index(shard_folder).table(["num_tiles", "answer_tokens"], "test")
    rows = table.filter(pc.greater(table["answer_tokens"], 0))["row"].to_numpy()
    with_pictures = table.filter(pc.greater(table["num_tiles"], 0))["row"].to_numpy()
    chosen = chosen_rows(rows, evaluate.max_samples, evaluate.seed)
    if not np.isin(chosen, with_pictures).any():
        raise UserError(
            f"not started, because evaluate.max_samples={evaluate.max_samples} draws only test samples "
            "without pictures; raise it, or set it to 0 for all"
        )


def _check_adopted_tiles(config: PipelineConfig, needs: Sequence[SplitNeed], shard_folder: Path) -> None:
    """Raise UserError if the router takes its labels from an adopted result without tiles of these shards."""
    for prefix in ("", f"{JOINT}_"):
        labelled_by = (f"{prefix}{stage}" for stage in _LABELLED_BY)
        adopted = next((stage for stage in labelled_by if stage in config.inputs.adopt), None)
        router_needs = [need for need in needs if need.stage == f"{prefix}router"]
        if adopted is not None and router_needs:
            _check_adopted_keys(config.inputs.adopt[adopted], adopted, router_needs, shard_folder)


def _check_adopted_keys(
    folder: Path, adopted: str, router_needs: Sequence[SplitNeed], shard_folder: Path
) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from data_prep.shards.index import load_index

    table = _LABELLED_BY[block_path(adopted)[-1]]
    keys = pc.unique(pq.read_table(folder / table, columns=["key"])["key"])
    index = load_index(shard_folder)
    for need in router_needs:
        here = index.table(["key"], need.split)["key"]
        if not pc.any(pc.is_in(here, keys.cast(here.type))).as_py():
            raise UserError(
                f"not started, because {need.stage} needs labels of {need.split} tiles {need.purpose}, and "
                f"inputs.adopt.{adopted}={folder} has no tile of the {need.split} samples of these shards; "
                "adopt a result that was made from them, with that split"
            )
