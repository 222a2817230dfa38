"""What the stages need of the splits: samples with a picture and an answer, each for a purpose.

What the config alone shows is refused here, before anything starts. What only the shards show is in
`pipeline/planning/shard_contents.py`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

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
    needs = [
        SplitNeed("consistency", "train", "to train on"),
        SplitNeed("ratio", "train", "to take tau from"),
        SplitNeed("router", "train", "to train on"),
        SplitNeed("router", "calib", "to calibrate the threshold on"),
        SplitNeed("evaluate", "test", "to measure on"),
    ]
    if getattr(getattr(config, "consistency", None), "select", "last") == "best":
        needs.append(SplitNeed("consistency", "calib", "to choose the best policy by (select: best)"))
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
    made_here = {"ratio", "label", "router"}.intersection(stages).difference(config.inputs.adopt)
    splits = getattr(getattr(config, "ratio", None), "splits", ())
    if len(made_here) == 3 and "calib" not in splits:
        raise UserError(
            f"ratio.splits={','.join(splits)} gives the calib tiles no labels, and router needs some to "
            "calibrate the threshold on; add calib to ratio.splits"
        )
