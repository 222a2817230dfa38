"""Router training: the router learns the labels from vision tokens, then its absolute threshold is
calibrated.

Config and entry; what a rank does is in `stages/router/worker.py`.
"""

from stages.context import Context
from stages.router.config import RouterConfig
from stages.training.optimizer import note_slow_dtype

CODE_VERSION = 2
INPUTS = ("shard", "consistency", "label")
NEEDS_RAY = True
Config = RouterConfig


def run(config: RouterConfig, context: Context) -> dict[str, float | int | str]:
    """Trains on all ranks and publishes `router.safetensors`, `scores.parquet`, `metrics.json` and
    `curve.parquet`."""
    from stages.router.metrics import publish_metrics
    from stages.router.packs import RouterSettings, prepared
    from stages.router.worker import measure_router, train_router
    from stages.training.checkpoints import remove_checkpoints
    from stages.training.metrics import publish_curve
    from stages.training.rank_failures import restart_counts
    from stages.training.throughput import run_throughput
    from stages.training.workers import run_workers

    settings = RouterSettings(
        config=config,
        shard_folder=context.inputs["shard"],
        policy_folder=context.inputs["consistency"] / "policy",
        label_folder=context.inputs["label"],
        parts=context.parts,
        train=context.site.train,
    )
    num_steps = prepared(settings, context.site.resources.workers)
    if not context.parts.done("scores.parquet"):
        note_slow_dtype(config.optimizer, context)
        run_throughput(measure_router, settings, context, num_steps=num_steps)
        run_workers(train_router, settings, context, num_steps=num_steps, last_part="scores.parquet")
    metrics = publish_metrics(context.parts, context.inputs["label"], config.compress_share)
    publish_curve(context.parts)
    remove_checkpoints(context.parts)
    figures = {name: value for name, value in metrics.items() if value is not None}
    return {"steps": num_steps, **restart_counts(context.parts), **figures}
