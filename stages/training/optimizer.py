"""The optimizer and schedule of a training: hashed settings that consistency and router training share."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from stages.context import Context


class OptimizerConfig(BaseModel):
    """AdamW with a linear warm-up, then a cosine from `learning_rate` down to `final_lr_share` of it, and
    gradients clipped by their global norm."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    warmup_share: float = Field(0.03, ge=0, lt=1)
    """Share of all updates in which the learning rate rises linearly from near 0."""
    final_lr_share: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of `learning_rate`; 0: down to zero, 1: constant."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of AdamW. Biases, norms and layer scales do not decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay rate of the mean of the gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay rate of the mean of the squared gradients."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient over all parameters; a larger gradient is scaled down to it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations; on CUDA bfloat16 is the fast one. Master weights are float32 in
    both."""
    gradient_sums: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the ranks add up their gradients. bfloat16 halves the bytes they send, but every
    addition rounds: the error is 0.4 % of the gradient's norm on 8 ranks, 0.9 % on 64 and 2.3 % on 512
    (simulated)."""

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of update `step` (from 0) of `num_steps`; it depends on the step alone."""
        warmup = self.warmup_share * num_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (math.ceil(warmup) + 1)
        progress = (step - warmup) / max(num_steps - warmup, 1)
        floor = self.final_lr_share
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def note_slow_dtype(config: OptimizerConfig, context: Context) -> None:
    """Warn about a float32 training on CUDA, which uses neither the varlen kernel nor tensor cores."""
    if config.dtype == "float32" and context.site.resources.gpus_per_worker:
        context.note(f"trains in float32, slowly on CUDA; {context.stage}.optimizer.dtype: bfloat16 is fast")
