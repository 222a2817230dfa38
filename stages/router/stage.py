"""The router stage: routers learn the labels from vision features, the best on calib tiles is kept, then its
absolute threshold is calibrated.

`stages/router/worker.py` is the code of a rank.
"""

from stages.context import Context
from stages.outputs import POLICY_FOLDER, SCORES_FILE
from stages.router.config import RouterConfig
from stages.training.optimizer import note_slow_dtype

CODE_VERSION = 4
INPUTS = ("shard", "consistency", "label")
NEEDS_RAY = True
Config = RouterConfig


def run(config: RouterConfig, context: Context) -> dict[str, float | int | str]:
    """Train on all ranks; publish the router, its scores, `metrics.json`, `curve.parquet` and a figure."""
    from stages.router.metrics import publish_metrics
    from stages.router.packs import RouterSettings, prepared
    from stages.router.worker import measure_router, train_router
    from stages.training.checkpoints import remove_checkpoints
    from stages.training.kept.folders import kept_folder
    from stages.training.metrics import publish_curve
    from stages.training.ranks.rank_failures import restart_counts
    from stages.training.ranks.workers import run_workers
    from stages.training.speed.throughput import run_throughput

    settings = RouterSettings(
        config=config,
        shard_folder=context.folder("shard"),
        policy_folder=context.folder("consistency") / POLICY_FOLDER,
        label_folder=context.folder("label"),
        parts=context.parts,
        train=context.site.train,
    )
    num_steps = prepared(settings)
    if not context.parts.done(SCORES_FILE):
        note_slow_dtype(config.optimizer, context)
        run_throughput(measure_router, settings, context, num_steps=num_steps)
        run_workers(train_router, settings, context, num_steps=num_steps, last_part=SCORES_FILE)
    metrics = publish_metrics(config, context, num_steps)
    publish_curve(context.parts)
    remove_checkpoints(context.parts)
    context.parts.delete(kept_folder(context.parts))
    measured = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
    last_step = max(metrics["candidates"], key=lambda candidate: candidate["auc_calib"])["step"]
    return {"steps": last_step, **restart_counts(context.parts), **measured}
