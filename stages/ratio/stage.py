"""The ratio stage: how much each tile's compression costs, as losses of the policy against the reference.

The expensive result of the pipeline: raw losses a tile. Floor, percentile and window belong to the label
stage.
"""

from stages.context import Context
from stages.inference import inference_settings
from stages.outputs import RATIOS_FILE
from stages.ratio.config import RatioConfig

CODE_VERSION = 1
INPUTS = ("shard", "model", "consistency")
NEEDS_RAY = True
Config = RatioConfig


def run(config: RatioConfig, context: Context) -> dict[str, float | int | str]:
    """Publishes `parts/<shard>.parquet` a shard, then `ratios.parquet`, a row a tile, and `metrics.json`."""
    from cluster.ray_session import ray_session
    from cluster.tasks import actor_pool
    from stages.ratio.actor import RatioActor, part_name, shards_of

    items = shards_of(config, context.inputs["shard"])
    todo = [item for item in items if not context.parts.done(part_name(item.shard))]
    num_done = len(items) - len(todo)
    context.progress(num_done, len(items), "shards")
    actor = (inference_settings(context, config.dtype), config.unit, context.parts)
    if todo:
        with ray_session(context.site):
            for _ in actor_pool(
                RatioActor, actor, todo, "write_part", site=context.site, check=context.check
            ):
                num_done += 1
                context.progress(num_done, len(items), "shards")
    num_tiles = _merge(context, [part_name(item.shard) for item in items])
    return {"samples": sum(len(item.rows) for item in items), "tiles": num_tiles}


def _merge(context: Context, names: list[str]) -> int:
    """Publishes the table of all parts in shard order, and its medians; the number of tiles."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.ratio.actor import SCHEMA, medians

    parts = context.parts
    tables = [pq.read_table(parts.output / name) for name in names]
    ratios = pa.concat_tables([SCHEMA.empty_table(), *tables])
    pq.write_table(ratios, parts.partial(RATIOS_FILE))
    parts.publish(RATIOS_FILE, replace=True)
    metrics = medians(ratios)
    parts.write_json("metrics.json", metrics)
    context.log({f"median_{name}": value for name, value in metrics["all"].items()}, 0)
    return len(ratios)
