"""Router training: the router learns the labels from vision tokens, then its absolute threshold is
calibrated.

Config and entry; what a rank does is in `stages/router_worker.py`.
"""

from pydantic import Field

from stages.context import Context
from stages.optimizer_config import OptimizerConfig, note_slow_dtype
from stages.stage_config import StageConfig

CODE_VERSION = 2
INPUTS = ("shard", "consistency", "label")
NEEDS_RAY = True


class RouterConfig(StageConfig):
    """What the router is trained on and how; every field changes the result."""

    seed: int | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    tiles_per_pack: int = Field(64, gt=0)
    packs_per_step: int = Field(4, gt=0)
    window_samples: int = Field(4096, gt=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0)
    """0: no limit but `epochs`."""
    validate_every_steps: int = Field(100, gt=0)
    validation_packs: int = Field(64, gt=0)
    """Packs of calibration tiles for the curve, evenly spread; threshold and scores see all tiles."""
    compress_share: float | None = Field(None, ge=0, le=1)
    """Share of calibration tiles that the threshold compresses; null: the share their labels compress."""


Config = RouterConfig


def run(config: RouterConfig, context: Context) -> dict[str, float | int | str]:
    """Trains on all ranks and publishes `router.safetensors`, `scores.parquet`, `metrics.json` and
    `curve.parquet`."""
    from stages.restarts import restart_counts
    from stages.router_metrics import publish_metrics
    from stages.router_worker import RouterSettings, measure_router, prepared, train_router
    from stages.throughput import run_throughput
    from stages.train_checkpoints import remove_checkpoints
    from stages.train_workers import run_workers
    from stages.training_metrics import publish_curve

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
