"""Consistency training: the policy learns to answer like the frozen reference at any rates of its tiles.

This is the stage's entry; what a rank does is in `stages/consistency/worker.py`.
"""

from typing import TYPE_CHECKING

from stages.consistency.config import ConsistencyConfig
from stages.consistency.rate_rule import rate_warning
from stages.context import Context
from stages.outputs import POLICY_FOLDER
from stages.training.optimizer import note_slow_dtype
from vico.memory.model_sizes import model_sizes
from vico.model_files import model_config

if TYPE_CHECKING:
    from stages.consistency.packs import ConsistencySettings

CODE_VERSION = 3
INPUTS = ("shard", "model")
NEEDS_RAY = True
Config = ConsistencyConfig


def run(config: ConsistencyConfig, context: Context) -> dict[str, float | int | str]:
    """Train on all ranks and publish `policy/` (a model folder) and `curve.parquet`; return the last
    metrics."""
    from stages.consistency.packs import ConsistencySettings

    settings = ConsistencySettings(
        config=config,
        shard_folder=context.folder("shard"),
        model_folder=context.folder("model"),
        parts=context.parts,
        train=context.site.train,
    )
    return run_training(settings, context)


def run_training(settings: "ConsistencySettings", context: Context) -> dict[str, float | int | str]:
    """Train on all ranks, publish and return the last metrics, as `run` does."""
    from stages.consistency.disk import check_disk, kept_bytes
    from stages.consistency.packs import prepared
    from stages.training.checkpoints import remove_checkpoints
    from stages.training.kept.folders import kept_folder, remove_half_kept
    from stages.training.metrics import publish_curve
    from stages.training.ranks.rank_failures import restart_counts
    from stages.training.ranks.workers import run_workers
    from stages.training.speed.throughput import run_throughput
    from stages.training.universal import remove_conversions

    packs = prepared(settings)
    num_steps = packs.num_steps
    if not context.parts.done(POLICY_FOLDER):
        note_slow_dtype(settings.config.optimizer, context)
        num_parameters = model_sizes(model_config(settings.model_folder)).base
        if warning := rate_warning(settings.config, num_parameters, settings.block):
            context.note(warning)
        remove_conversions(context.parts)
        remove_half_kept(context.parts)
        remote = context.site.remote is not None
        check_disk(settings, context.site.resources.workers, kept_bytes(settings, packs), remote=remote)
        run_throughput(_measure, settings, context, num_steps=num_steps)
        run_workers(_train, settings, context, num_steps=num_steps, last_part=POLICY_FOLDER)
    curve = publish_curve(context.parts)
    remove_checkpoints(context.parts)
    context.parts.delete(kept_folder(context.parts))
    return {"steps": num_steps, **restart_counts(context.parts), **curve}


# What a rank runs is imported on the rank: the driver and Ray Train's controller do not need DeepSpeed and
# transformers, which take seconds and memory.
def _train(settings: "ConsistencySettings") -> None:
    from stages.consistency.worker import train_policy

    train_policy(settings)


def _measure(settings: "ConsistencySettings") -> None:
    from stages.consistency.worker import measure_policy

    measure_policy(settings)
