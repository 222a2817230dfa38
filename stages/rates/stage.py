"""The rates stage: the rate that the first router chooses for every train tile.

The joint training plans its packs with these rates. They come from the vision tower of the policy that the
router was trained on, even if the joint training changes its own tower: the router knows no other features,
and a tile then has one rate for the whole training, whatever the number of ranks and restarts.
"""

from collections.abc import Sequence

from stages.context import Context
from stages.inference import inference_settings
from stages.outputs import METRICS_FILE, POLICY_FOLDER, ROUTER_FILE, part_name
from stages.rates.config import RatesConfig

CODE_VERSION = 1
INPUTS = ("shard", "model", "consistency", "router")
NEEDS_RAY = True
Config = RatesConfig


def run(config: RatesConfig, context: Context) -> dict[str, float | int | str]:
    """Publish one part per shard with the probabilities of its train tiles, and `metrics.json`.

    Raises UserError if the router has no threshold or was trained on another policy.
    """
    from cluster.ray_session import ray_session
    from cluster.tasks import actor_pool
    from stages.rates.actor import RatesActor, train_shards
    from stages.router_files import calibrated_threshold, check_router_policy

    router_folder, policy_folder = context.folder("router"), context.folder("consistency") / POLICY_FOLDER
    threshold = calibrated_threshold(router_folder)
    check_router_policy(router_folder, policy_folder)
    shards = train_shards(context.folder("shard"))
    open_shards = [shard for shard in shards if not context.parts.done(part_name(shard.shard))]
    num_done = len(shards) - len(open_shards)
    context.progress(num_done, len(shards), "shards")
    arguments = (inference_settings(context, config.dtype), router_folder / ROUTER_FILE, context.parts)
    if open_shards:
        with ray_session(context.site):
            for _ in actor_pool(
                RatesActor, arguments, open_shards, "write_part", site=context.site, check=context.check
            ):
                num_done += 1
                context.progress(num_done, len(shards), "shards")
    return _publish_metrics(context, [part_name(shard.shard) for shard in shards], threshold)


def _publish_metrics(
    context: Context, names: Sequence[str], threshold: float
) -> dict[str, float | int | str]:
    """Publish threshold, policy and the share of compressed tiles; return the counts."""
    import numpy as np
    import pyarrow.parquet as pq

    from stages.losses_policy import policy_digest

    tiles = compressed = 0
    for name in names:
        p_compress = pq.read_table(context.parts.output / name, columns=["p_compress"])["p_compress"]
        tiles += len(p_compress)
        compressed += int(np.sum(p_compress.to_numpy() >= np.float32(threshold)))
    counts = {"tiles": tiles, "share_compressed": compressed / max(tiles, 1)}
    policy = policy_digest(context.folder("consistency") / POLICY_FOLDER)
    metrics = {**counts, "absolute_threshold": threshold, "policy": policy}
    context.parts.write_json(METRICS_FILE, metrics)
    context.log({"share_compressed": counts["share_compressed"]}, 0)
    return dict(counts)
