"""How DeepSpeed is to run: the hashed config and the site's part as one DeepSpeed config."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.site import TrainSettings
from stages.training.optimizer import OptimizerConfig
from vico.errors import UserError

# What a site's DeepSpeed JSON may say: how memory, messages and reports are arranged. Everything else can
# change the result and belongs to the pipeline's config.
_SITES_OWN = frozenset(
    {
        "zero_optimization",
        "comms_logger",
        "flops_profiler",
        "memory_breakdown",
        "wall_clock_breakdown",
    }
)
_WITHOUT_EFFECT = {
    "activation_checkpointing": "set train.activation_checkpointing, which is that of transformers",
    "aio": "leave it out: nothing is offloaded to NVMe (train.offload)",
}
_SITES_OWN_ZERO = frozenset(
    {
        "stage",
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "memory_efficient_linear",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    }
)


@dataclass(frozen=True)
class EngineSettings:
    """How the engine runs (site) and what it computes (hashed config): both are needed to build it.

    `num_micro_steps` micro-steps make an optimizer step; `dtype` float32 or bfloat16; `zero_stage` 1, 2 or 3.
    """

    num_micro_steps: int
    dtype: torch.dtype
    grad_clip: float
    betas: tuple[float, float]
    zero_stage: int
    offload: str
    deepspeed: Mapping[str, object]

    def as_dict(self) -> dict:
        """The DeepSpeed config; UserError names a key of the site's JSON that is not the site's to set."""
        check_deepspeed(self.deepspeed, self.zero_stage)
        zero = {
            "stage": self.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            **offloading(self.offload, self.zero_stage),
            **dict(self.deepspeed.get("zero_optimization", {})),
        }
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.num_micro_steps,
            "gradient_clipping": self.grad_clip,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            # without it ZeRO adds the gradients of micro-steps in bf16, and small ones are lost in the sum
            **({"data_types": {"grad_accum_dtype": "fp32"}} if self.dtype == torch.bfloat16 else {}),
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            **{key: value for key, value in self.deepspeed.items() if key != "zero_optimization"},
            "zero_optimization": zero,
        }


def engine_settings(optimizer: OptimizerConfig, packs_per_step: int, site: TrainSettings) -> EngineSettings:
    """The engine's settings of a hashed config on this site; the process group must be there."""
    return EngineSettings(
        num_micro_steps=-(-packs_per_step // torch.distributed.get_world_size()),
        dtype=getattr(torch, optimizer.dtype),
        grad_clip=optimizer.grad_clip,
        betas=(optimizer.beta1, optimizer.beta2),
        zero_stage=site.zero_stage,
        offload=site.offload,
        deepspeed=site.deepspeed,
    )


def check_engine_settings(site: TrainSettings) -> None:
    """UserError for what no rank could be started with, before one is."""
    check_deepspeed(site.deepspeed, site.zero_stage)
    offloading(site.offload, site.zero_stage)


def check_deepspeed(wanted: Mapping[str, object], zero_stage: int) -> None:
    """UserError for a key of the site's own DeepSpeed config that is not the site's to set, does nothing, or
    says otherwise than the site."""
    zero = dict(wanted.get("zero_optimization", {}))
    for key, remedy in _WITHOUT_EFFECT.items():
        if key in wanted:
            raise UserError(f"train.deepspeed.{key} in the site file has no effect; {remedy}")
    refused = sorted(set(wanted) - _SITES_OWN)
    refused += [f"zero_optimization.{key}" for key in sorted(set(zero) - _SITES_OWN_ZERO)]
    if refused:
        raise UserError(
            f"train.deepspeed.{refused[0]} in the site file can change the result, so it is not the "
            "site's to set; leave it out, or set what it means in the pipeline's config"
        )
    if zero.get("stage", zero_stage) != zero_stage:
        raise UserError(
            f"train.deepspeed.zero_optimization.stage={zero['stage']} and train.zero_stage="
            f"{zero_stage} differ; set train.zero_stage alone"
        )


def offloading(what: str, zero_stage: int) -> dict[str, object]:
    """ZeRO's keys that keep optimizer states, or parameters too, in host memory; UserError where the stage
    has no parameters to move."""
    if what == "none":
        return {}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if what == "optimizer":
        return {"offload_optimizer": host}
    if zero_stage != 3:
        raise UserError(
            f"train.offload=parameters needs train.zero_stage=3, it is {zero_stage}; set zero_stage: 3, or "
            "offload: optimizer"
        )
    return {"offload_optimizer": host, "offload_param": host}
