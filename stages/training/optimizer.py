"""How a training stage optimises: the hashed settings shared by consistency and router training."""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from stages.context import Context


class OptimizerConfig(BaseModel):
    """AdamW with a linear warm-up and a cosine down to `final_lr_share` of `learning_rate`; clipping by
    global norm."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(1e-4, gt=0)
    warmup_share: float = Field(0.03, ge=0, lt=1)
    final_lr_share: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    grad_clip: float = Field(1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; on CUDA bfloat16 is the fast one. Master weights are float32 in both."""

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of update `step` (from 0) of `num_steps`; depends on the step alone."""
        warmup = self.warmup_share * num_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (math.ceil(warmup) + 1)
        way = (step - warmup) / max(num_steps - warmup, 1)
        floor = self.final_lr_share
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * way)))


def note_slow_dtype(config: OptimizerConfig, context: Context) -> None:
    """Say that a training on CUDA is in float32, which no varlen kernel and no tensor core takes as it is."""
    if config.dtype == "float32" and context.site.resources.gpus_per_worker:
        context.note(f"trains in float32, slowly on CUDA; {context.stage}.optimizer.dtype: bfloat16 is fast")


def num_training_steps(epochs: float, max_steps: int, steps_of_epoch: Callable[[int], int]) -> int:
    """Updates of a training: `epochs` of the data, at most `max_steps` where that is not 0.

    Epochs may differ in their number of steps (fractional repeats), so each is asked for its own, up to the
    limit.
    """
    steps = 0
    for epoch in range(math.ceil(epochs)):
        steps += math.ceil(min(1.0, epochs - epoch) * steps_of_epoch(epoch))
        if max_steps and steps >= max_steps:
            return max_steps
    return steps
