"""What the stages need of the splits: samples with a picture and an answer, each for a purpose.

What the config alone shows is refused here, before anything starts. What only the shards show is in
`pipeline/planning/shard_contents.py`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from pipeline.config.graph import JOINT, block_path
from pipeline.config.pipeline_file import PipelineConfig
from vico.errors import Faults, UserError


@dataclass(frozen=True)
class SplitNeed:
    """A stage needs at least one sample with a picture and an answer in a split; `purpose` says what for."""

    stage: str
    split: Literal["train", "calib", "test"]
    purpose: str


def split_needs(config: PipelineConfig, stages: Collection[str]) -> list[SplitNeed]:
    """Return what these stages need of the splits. Stages that adopt a result need nothing."""
    configs = dict(config.stage_configs())
    needs = []
    for prefix in ("", f"{JOINT}_"):
        needs += [
            SplitNeed(f"{prefix}consistency", "train", "to train on"),
            SplitNeed(f"{prefix}ratio", "train", "to take tau from"),
            SplitNeed(f"{prefix}router", "train", "to train on"),
            SplitNeed(f"{prefix}router", "calib", "to calibrate the threshold on"),
        ]
        if getattr(configs.get(f"{prefix}consistency"), "select", "last") == "best":
            purpose = "to choose the best policy by (select: best)"
            needs.append(SplitNeed(f"{prefix}consistency", "calib", purpose))
    needs.append(SplitNeed("evaluate", "test", "to measure on"))
    return [need for need in needs if need.stage in stages and need.stage not in config.inputs.adopt]


def check_split_needs(config: PipelineConfig, stages: Collection[str]) -> None:
    """Raise UserError if the config itself leaves a split empty that one of these stages needs."""
    faults = Faults()
    if "shard" in stages and "shard" not in config.inputs.adopt:
        for need in split_needs(config, stages):
            with faults.collected():
                _check_share(config, need)
    with faults.collected():
        _check_calib_has_labels(config, stages)
    faults.raise_all()


def _check_share(config: PipelineConfig, need: SplitNeed) -> None:
    field = f"{need.split}_share"
    if need.split == "train" or getattr(config.stage("shard"), field) > 0:
        return
    if need.split == "calib":
        raise UserError(
            f"shard.{field}=0 leaves no calib samples, and {need.stage} needs some {need.purpose}; "
            f"set shard.{field} above 0, such as 0.1"
        )
    if config.inputs.heldout is None:
        raise UserError(
            f"shard.{field}=0 without inputs.heldout leaves no test samples, and {need.stage} needs some "
            f"{need.purpose}; set shard.{field} above 0, such as 0.1, or give inputs.heldout"
        )


def _check_calib_has_labels(config: PipelineConfig, stages: Collection[str]) -> None:
    configs = dict(config.stage_configs())
    faults = Faults()
    for prefix in ("", f"{JOINT}_"):
        names = {f"{prefix}{name}" for name in ("ratio", "label", "router")}
        made_here = names.intersection(stages).difference(config.inputs.adopt)
        splits = getattr(configs.get(f"{prefix}ratio"), "splits", ())
        if len(made_here) == 3 and "calib" not in splits:
            block = ".".join(block_path(f"{prefix}ratio"))
            faults.note(
                f"{block}.splits={','.join(splits)} gives the calib tiles no labels, and {prefix}router "
                f"needs some to calibrate the threshold on; add calib to {block}.splits"
            )
    faults.raise_all()
