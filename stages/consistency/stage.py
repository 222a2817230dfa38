"""Consistency training: the policy learns to answer like the frozen reference whatever the rates of its
tiles.

Config and entry; what a rank does is in `stages/consistency/worker.py`.
"""

from typing import Any

from stages.consistency.config import ConsistencyConfig
from stages.context import Context
from stages.training.optimizer import note_slow_dtype

CODE_VERSION = 2
INPUTS = ("shard", "model")
NEEDS_RAY = True
Config = ConsistencyConfig


def run(config: ConsistencyConfig, context: Context) -> dict[str, float | int | str]:
    """Trains on all ranks and publishes `policy/` (a model folder) and `curve.parquet`; returns the last
    figures."""
    from stages.consistency.packs import ConsistencySettings, check_disk, prepared
    from stages.training.checkpoints import remove_checkpoints
    from stages.training.metrics import publish_curve
    from stages.training.rank_failures import restart_counts
    from stages.training.throughput import run_throughput
    from stages.training.universal import remove_conversions
    from stages.training.workers import run_workers

    settings = ConsistencySettings(
        config=config,
        shard_folder=context.inputs["shard"],
        model_folder=context.inputs["model"],
        parts=context.parts,
        train=context.site.train,
    )
    num_steps = prepared(settings, context.site.resources.workers)
    if not context.parts.done("policy"):
        note_slow_dtype(config.optimizer, context)
        remove_conversions(context.parts)
        check_disk(settings, context.site.resources.workers, remote=context.site.remote is not None)
        run_throughput(_measure, settings, context, num_steps=num_steps)
        run_workers(_train, settings, context, num_steps=num_steps, last_part="policy")
    curve = publish_curve(context.parts)
    remove_checkpoints(context.parts)
    return {"steps": num_steps, **restart_counts(context.parts), **curve}


# What a rank runs is imported there: DeepSpeed and transformers cost the driver, and Ray's controller of the
# training, seconds and memory for nothing.
def _train(settings: Any) -> None:
    from stages.consistency.worker import train_policy

    train_policy(settings)


def _measure(settings: Any) -> None:
    from stages.consistency.worker import measure_policy

    measure_policy(settings)
