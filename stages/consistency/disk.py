"""Disk space of the consistency training: the estimate, also for `vico plan`, and the check before it."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.consistency.config import ConsistencyConfig
from stages.training.checkpoints import best_policies, checkpoints, read_metadata
from stages.training.kept.folders import kept_bytes_on_disk
from vico.checkpoints.tensor_files import stored_tensors
from vico.errors import UserError
from vico.memory.model_sizes import model_sizes
from vico.model_files import model_config

if TYPE_CHECKING:
    from stages.consistency.packs import ConsistencyPacks, ConsistencySettings

_OPTIMIZER_BYTES = 3 * 4
"""Per parameter: a master copy and two moments, in float32 whatever the dtype of the weights."""
_LEAST_PASSES = 1.25
"""Computing and writing what is kept costs 1.05 to 1.2 passes of what it saves
(`benchmarks/kept_outputs.py`)."""
_MARGIN = 1.1
"""A tenth more, for the new connector and the small files of a checkpoint."""


@dataclass(frozen=True)
class TrainingBytes:
    """An upper estimate of the bytes of one checkpoint (the states of all ranks) and of one model folder."""

    checkpoint: int
    model: int


def training_bytes(config: ConsistencyConfig, model_folder: Path) -> TrainingBytes:
    """Return the estimate for a model folder, from the headers of its weight files.

    Raises UserError if a weight file is missing or cut short.
    """
    num_parameters = sum(math.prod(tensor.shape) for tensor in stored_tensors(model_folder).values())
    weight_bytes = 4 if config.optimizer.dtype == "float32" else 2
    return TrainingBytes(
        checkpoint=int(_MARGIN * num_parameters * (weight_bytes + _OPTIMIZER_BYTES)),
        model=int(_MARGIN * num_parameters * weight_bytes),
    )


def most_checkpoints(keep_checkpoints: int, *, remote: bool) -> int:
    """Return how many checkpoints are on the disk at the same time.

    A new one is written before the oldest is removed; with an object store, one more may still be uploading.
    """
    return keep_checkpoints + (2 if remote else 1)


def most_policies(config: ConsistencyConfig) -> int:
    """Return how many model folders are on the disk at the same time: the policy, and with `select: best` the
    best one and the one before it."""
    return 3 if config.select == "best" else 1


@dataclass(frozen=True)
class KeptBytes:
    """Bytes of vision features and of reference states that a training keeps; 0: it keeps none."""

    features: int = 0
    states: int = 0


def kept_bytes(settings: "ConsistencySettings", packs: "ConsistencyPacks") -> KeptBytes:
    """Return an upper estimate of what the training keeps of its frozen parts, as if validations read all
    calib samples.

    It keeps them if it reads its samples at least 1.25 times: the states unless it learns the answers
    themselves, the features of a frozen tower that the reference has, too. What exceeds the site's limit is
    left out, the larger features first.
    """
    config, limit = settings.config, settings.train.memory.frozen_outputs_gb * 1e9
    totals = packs.totals()
    if totals.passes < _LEAST_PASSES:
        return KeptBytes()
    sizes = model_sizes(model_config(settings.model_folder))
    value_bytes = 4 if config.optimizer.dtype == "float32" else 2
    states = features = 0
    if config.target == "reference":
        states = totals.answer_tokens * sizes.width * value_bytes
    if not config.train_vision:
        features = totals.tiles * packs.settings.vision_tokens * sizes.vision_width * value_bytes
    states = states if states <= limit else 0
    return KeptBytes(features if features + states <= limit else 0, states)


def check_disk(
    settings: "ConsistencySettings", num_workers: int, kept: KeptBytes, *, remote: bool = False
) -> None:
    """Raise UserError if the storage (`remote`: the working copy of an object store) has no room for the
    training.

    Room is needed for the checkpoints, model folders and `kept` values that are not written yet and, if
    another number of ranks wrote the last checkpoint, for its conversion.
    """
    needed_bytes = training_bytes(settings.config, settings.model_folder)
    written = checkpoints(settings.parts)
    keep = settings.train.checkpoints.keep
    most = most_checkpoints(keep, remote=remote)
    missing = max(most - len(written), 1)
    conversions = 0
    if written:
        world_size = read_metadata(written[-1][1])["world_size"]
        conversions = 2 * (world_size != num_workers)  # with DeepSpeed's intermediate slices
    policies = max(most_policies(settings.config) - min(len(best_policies(settings.parts)), 2), 1)
    outputs = max(kept.features + kept.states - kept_bytes_on_disk(settings.parts), 0)
    needed = needed_bytes.checkpoint * (missing + conversions) + needed_bytes.model * policies + outputs
    free = shutil.disk_usage(settings.parts.folder).free
    if free < needed:
        raise UserError(
            f"{'work' if remote else 'storage'}={settings.parts.folder} has {free / 1e9:.1f} GB free, but "
            f"{settings.block} needs up to {needed / 1e9:.1f} GB: {missing} more checkpoints of "
            f"{needed_bytes.checkpoint / 1e9:.1f} GB (train.checkpoints.keep={keep} and {most - keep} more)"
            + (", the last one converted for another number of ranks" if conversions else "")
            + f", {policies} model folders"
            + (f", {outputs / 1e9:.1f} GB of what its frozen parts compute" if outputs else "")
            + "; free some space or choose another "
            + ("`work` in the site" if remote else "--storage")
            + (", or set train.memory.frozen_outputs_gb: 0" if outputs else "")
        )
