"""What decides the memory of a training: from the stage's config, the sizes of its model and the site."""

from typing import Any

from cluster.site import Site
from stages.consistency.config import ConsistencyConfig
from vico.memory.model_sizes import ModelSizes
from vico.memory.training_memory import GradientExchange, TrainingShape


def training_shape(config: ConsistencyConfig, sizes: ModelSizes, site: Site) -> TrainingShape:
    """Return what decides the memory of a training on `site`, the site as its stage sees it."""
    memory, resources = site.train.memory, site.resources
    return TrainingShape(
        tokens=pack_tokens(config, sizes),
        tiles=pack_tiles(config, sizes),
        num_ranks=resources.workers,
        weight_bytes=_bytes(config.optimizer.dtype),
        zero_stage=memory.zero_stage,
        offload=memory.offload,
        reference=memory.reference,
        checkpointing=memory.activation_checkpointing,
        train_vision=config.train_vision,
        kl_chunk_rows=memory.chunk_rows(on_gpus=resources.gpus_per_worker > 0),
        packs_per_rank=-(-config.packs_per_step // resources.workers),
        exchange=_exchange(config, sizes, site),
        fused=resources.gpus_per_worker > 0,
    )


def pack_tiles(config: ConsistencyConfig, sizes: ModelSizes) -> int:
    """Return the most tiles of a pack: each has its tokens in the reference's row."""
    return min(config.tiles_per_pack, config.reference_tokens_per_pack // sizes.full_tokens)


def pack_tokens(config: ConsistencyConfig, sizes: ModelSizes) -> int:
    """Return the policy's tokens in a full pack: its budget less what the drawn rates save of the tiles."""
    saved = config.compress_share * 0.75 * sizes.full_tokens * pack_tiles(config, sizes)
    return round(config.reference_tokens_per_pack - saved)


def _exchange(config: ConsistencyConfig, sizes: ModelSizes, site: Site) -> GradientExchange:
    zero, default = site.train.deepspeed.get("zero_optimization", {}), GradientExchange()
    bucket = _number(zero.get("reduce_bucket_size"), default.bucket_elements)
    on_gpus = site.resources.gpus_per_worker > 0
    if not on_gpus:  # the system gives a buffer its memory page by page, when it is written
        bucket = min(bucket, sizes.policy)
    return GradientExchange(
        sum_bytes=_bytes(config.optimizer.gradient_sums),
        bucket_elements=bucket,
        overlaps=on_gpus and zero.get("overlap_comm") is not False,
        live_elements=_number(zero.get("stage3_max_live_parameters"), default.live_elements),
    )


def _number(value: Any, default: int) -> int:
    """Return a number of the site's DeepSpeed keys, which may be a text such as 5e8.

    Any other value gives the default here; DeepSpeed itself refuses it when the training starts.
    """
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return default


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
