"""The ratio stage: what each tile's compression costs, as losses of the policy against the reference.

This is the expensive result of the pipeline: raw losses per tile. Floor, percentile and window belong to the
label stage.
"""

from collections.abc import Sequence

from stages.context import Context
from stages.inference import inference_settings
from stages.outputs import METRICS_FILE, POLICY_FOLDER, RATIOS_FILE, part_name
from stages.ratio.config import RatioConfig

CODE_VERSION = 2
INPUTS = ("shard", "model", "consistency")
NEEDS_RAY = True
Config = RatioConfig


def run(config: RatioConfig, context: Context) -> dict[str, float | int | str]:
    """Publish one part per shard, then `ratios.parquet`, one row per tile, and `metrics.json`."""
    from cluster.ray_session import ray_session
    from cluster.tasks import actor_pool
    from stages.ratio.actor import RatioActor
    from stages.ratio.samples import shards_of

    shards = shards_of(config, context.folder("shard"), context.note)
    open_shards = [shard for shard in shards if not context.parts.done(part_name(shard.shard))]
    num_done = len(shards) - len(open_shards)
    context.progress(num_done, len(shards), "shards")
    arguments = (inference_settings(context, config.dtype), config, context.parts)
    if open_shards:
        with ray_session(context.site):
            for _ in actor_pool(
                RatioActor, arguments, open_shards, "write_part", site=context.site, check=context.check
            ):
                num_done += 1
                context.progress(num_done, len(shards), "shards")
    num_tiles = _merge(context, [part_name(shard.shard) for shard in shards], config.isolation)
    return {"samples": sum(len(shard.rows) for shard in shards), "tiles": num_tiles}


def _merge(context: Context, names: Sequence[str], isolation: str) -> int:
    """Publish the table of all parts in shard order, and its medians; return the number of tiles."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.losses_policy import with_policy
    from stages.ratio.actor import SCHEMA, medians
    from stages.ratio_scale import with_isolation

    parts = context.parts
    tables = [pq.read_table(parts.output / name) for name in names]
    ratios = pa.concat_tables([SCHEMA.empty_table(), *tables])
    ratios = with_policy(ratios, context.folder("consistency") / POLICY_FOLDER)
    ratios = with_isolation(ratios, isolation)
    pq.write_table(ratios, parts.partial(RATIOS_FILE))
    parts.publish(RATIOS_FILE, replace=True)
    metrics = medians(ratios)
    parts.write_json(METRICS_FILE, metrics)
    context.log({f"median_{name}": value for name, value in metrics["all"].items()}, 0)
    return len(ratios)
