"""The config of the consistency stage."""

from typing import Literal

from pydantic import Field, model_validator

from stages.stage_config import StageConfig
from stages.training.optimizer import OptimizerConfig


class ConsistencyOptimizer(OptimizerConfig):
    """The published rate of the InternVL3.5 SFT scripts (8e-5, cosine, warm-up 3 %) as the default; those
    train in bfloat16."""

    learning_rate: float = Field(8e-5, gt=0)


class ConsistencyConfig(StageConfig):
    """What is trained on and how; every field changes the result."""

    seed: int | None = None
    optimizer: ConsistencyOptimizer = ConsistencyOptimizer()
    connector_start: Literal["full", "random"] = "full"
    """Where the new connector begins: with the full connector's weights laid into it, or as torch draws
    them. A model that brings a compressed connector keeps its own."""
    connector_lr_scale: float = Field(2.0, gt=0)
    """Learning rate of the new connector over that of the rest."""
    connector_warmup_steps: int = Field(0, ge=0)
    """Updates at the start in which the new connector alone is moved; schedule and clipping run as ever."""
    train_vision: bool = True
    """False freezes the vision tower; one pass of it then serves policy and reference."""
    vision_lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each layer of the vision tower to the one before it; 1: none."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Probability that a tile skips a branch of the vision tower's last layer, falling to 0 in the first."""
    rate_unit: Literal["tile", "image"] = "tile"
    """Whether each tile draws its rate or each image one rate for all of its tiles."""
    compress_share: float = Field(0.5, ge=0, le=1)
    loss_reduction: Literal["sample", "token", "square"] = "sample"
    reference_tokens_per_pack: int = Field(32768, gt=0)
    tiles_per_pack: int = Field(96, gt=0)
    packs_per_step: int = Field(8, gt=0)
    window_samples: int = Field(4096, gt=0)
    """Samples are shuffled, packed and balanced within windows of this many."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0)
    """0: no limit but `epochs`."""
    validate_every_steps: int = Field(100, gt=0)
    validation_packs: int = Field(8, gt=0)
    select: Literal["last", "best"] = "last"
    """The policy that is published: of the last step, or the one with the lowest validation KL."""

    @model_validator(mode="after")
    def settings_take_effect(self) -> "ConsistencyConfig":
        for field, neutral in (("vision_lr_decay", 1.0), ("drop_path", 0.0)):
            value = getattr(self, field)
            if not self.train_vision and value != neutral:
                raise ValueError(
                    f"{field}={value} has no effect while train_vision is false; set {field}: {neutral}, or "
                    "train_vision: true"
                )
        return self
