"""The DeepSpeed config of a training, from the hashed config and the settings of the site."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.train_settings import TrainSettings
from stages.training.optimizer import OptimizerConfig
from vico.errors import UserError

# Keys that a site's DeepSpeed JSON may set: how memory, messages and reports are arranged. All others can
# change the result and belong to the pipeline's config.
_SITE_KEYS = frozenset(
    {
        "zero_optimization",
        "comms_logger",
        "flops_profiler",
        "memory_breakdown",
        "wall_clock_breakdown",
    }
)
_KEYS_WITHOUT_EFFECT = {
    "activation_checkpointing": "set train.memory.activation_checkpointing, which works on layers",
    "aio": "leave it out: nothing is offloaded to NVMe (train.memory.offload)",
}
SITE_ZERO_KEYS = frozenset(
    {
        "stage",
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "memory_efficient_linear",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "stage3_allgather_sequential",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
        "zero_hpz_partition_size",
    }
)
"""Keys of `zero_optimization` that change no result: `tests/numerics/test_zero_equalities.py` compares each.
"""
# Keys that change the result and that the pipeline file sets, and where.
_PIPELINE_KEYS = {
    "communication_data_type": "optimizer.gradient_sums",
    "gradient_clipping": "optimizer.grad_clip",
    "gradient_accumulation_steps": "packs_per_step",
    "bf16": "optimizer.dtype",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
}


@dataclass(frozen=True)
class EngineSettings:
    """How the engine runs (site) and what it computes (hashed config): both are needed to build it.

    `num_micro_steps` micro-steps make one optimizer step; `dtype` and `gradient_sums` (over ranks) are
    float32 or bfloat16; `zero_stage` is 1, 2 or 3.
    """

    num_micro_steps: int
    dtype: torch.dtype
    grad_clip: float
    betas: tuple[float, float]
    zero_stage: int
    offload: str
    deepspeed: Mapping[str, Any]
    gradient_sums: torch.dtype = torch.float32
    num_ranks: int = 1
    fused: bool = False
    """Update by torch's fused AdamW: one kernel, without copies of the moments. Rounds differently."""

    def as_dict(self) -> dict[str, Any]:
        """Return the DeepSpeed config; UserError names a key of the site's JSON that a site may not set."""
        check_deepspeed(self.deepspeed, self.zero_stage)
        zero = {
            "stage": self.zero_stage,
            "overlap_comm": torch.cuda.is_available() and self.num_ranks > 1,  # one rank sends nothing
            "contiguous_gradients": True,
            **offloading(self.offload, self.zero_stage),
            **self.deepspeed.get("zero_optimization", {}),
        }
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.num_micro_steps,
            "gradient_clipping": self.grad_clip,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            # By default DeepSpeed sums over ranks in the dtype of the weights.
            "communication_data_type": {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.gradient_sums],
            # Otherwise ZeRO adds the gradients of micro-steps in bf16, which loses small ones in the sum.
            **({"data_types": {"grad_accum_dtype": "fp32"}} if self.dtype == torch.bfloat16 else {}),
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            **{key: value for key, value in self.deepspeed.items() if key != "zero_optimization"},
            "zero_optimization": zero,
        }


def engine_settings(optimizer: OptimizerConfig, packs_per_step: int, site: TrainSettings) -> EngineSettings:
    """Return the engine's settings of a hashed config on this site, in a process group that exists
    already."""
    num_ranks = torch.distributed.get_world_size()
    return EngineSettings(
        num_micro_steps=-(-packs_per_step // num_ranks),
        dtype=getattr(torch, optimizer.dtype),
        grad_clip=optimizer.grad_clip,
        betas=(optimizer.beta1, optimizer.beta2),
        zero_stage=site.memory.zero_stage,
        offload=site.memory.offload,
        deepspeed=site.deepspeed,
        gradient_sums=getattr(torch, optimizer.gradient_sums),
        num_ranks=num_ranks,
        fused=torch.cuda.is_available(),
    )


def check_engine_settings(site: TrainSettings) -> None:
    """Raise UserError for settings with which no rank could start, before one is started."""
    check_deepspeed(site.deepspeed, site.memory.zero_stage)
    offloading(site.memory.offload, site.memory.zero_stage)


def check_deepspeed(keys: Mapping[str, Any], zero_stage: int) -> None:
    """Raise UserError for a key of the site's DeepSpeed config that a site may not set, that has no effect,
    or that contradicts another setting of the site."""
    zero = keys.get("zero_optimization", {})
    for key, remedy in _KEYS_WITHOUT_EFFECT.items():
        if key in keys:
            raise UserError(f"train.deepspeed.{key} in the site file has no effect; {remedy}")
    refused = sorted(set(keys) - _SITE_KEYS)
    refused += [f"zero_optimization.{key}" for key in sorted(set(zero) - SITE_ZERO_KEYS)]
    if refused:
        counterpart = _PIPELINE_KEYS.get(refused[0])
        remedy = f"set {counterpart} of the stage in the pipeline file" if counterpart else "leave it out"
        raise UserError(
            f"train.deepspeed.{refused[0]} in the site file can change the result, so a site may not set it; "
            f"{remedy}"
        )
    if zero.get("stage", zero_stage) != zero_stage:
        raise UserError(
            f"train.deepspeed.zero_optimization.stage={zero['stage']} and train.memory.zero_stage="
            f"{zero_stage} differ; set only train.memory.zero_stage"
        )


def offloading(offload: str, zero_stage: int) -> dict[str, Any]:
    """Return ZeRO's keys that keep optimizer states, or parameters too, in host memory.

    Raises UserError if the ZeRO stage does not spread the parameters, so that they cannot be moved.
    """
    if offload == "none":
        return {}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload == "optimizer":
        return {"offload_optimizer": host}
    if zero_stage != 3:
        raise UserError(
            f"train.memory.offload=parameters needs train.memory.zero_stage=3, it is {zero_stage}; set "
            "train.memory.zero_stage: 3, or train.memory.offload: optimizer"
        )
    return {"offload_optimizer": host, "offload_param": host}
