"""The config of the consistency stage."""

from typing import Literal

from pydantic import Field, model_validator

from stages.stage_config import StageConfig
from stages.training.optimizer import OptimizerConfig


class ConsistencyOptimizer(OptimizerConfig):
    """AdamW as for the router, with the learning rate of the InternVL3.5 SFT scripts (8e-5, cosine, 3 %
    warm-up). Those scripts train in bfloat16."""

    learning_rate: float = Field(8e-5, gt=0)
    """Highest learning rate, reached at the end of the warm-up. The default is that of the InternVL3.5 SFT
    scripts."""


class ConsistencyConfig(StageConfig):
    """What the policy is trained on, and how. Every field changes the result."""

    seed: int = Field(ge=0)
    """Seed of all random draws of the stage: order and packing of samples, rates of tiles, new weights,
    dropout."""
    optimizer: ConsistencyOptimizer = ConsistencyOptimizer()
    connector_start: Literal["full", "random"] = "full"
    """Initial weights of a new compressed connector: those of the full connector placed into it, or torch's
    random initialisation. A model that has a compressed connector keeps its own."""
    connector_lr_scale: float = Field(2.0, gt=0)
    """Learning rate of the compressed connector, as a multiple of that of the other parameters."""
    connector_warmup_steps: int = Field(0, ge=0)
    """Number of updates at the start in which only the compressed connector changes. The learning rate
    schedule and gradient clipping are not affected."""
    train_vision: bool = True
    """Train the vision tower. If false it is frozen, and one pass of it serves policy and reference."""
    vision_lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each layer of the vision tower to the layer before it; 1: the same for
    all layers."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Probability that a tile skips a branch of the vision tower's last layer. It falls linearly to 0 in the
    first layer; 0: no branch is skipped."""
    rate_unit: Literal["tile", "image"] = "tile"
    """What draws a rate: each tile, or each image for all of its tiles."""
    compress_share: float = Field(0.5, ge=0, le=1)
    """Probability that a tile (or image, see `rate_unit`) gets the compressed rate in training."""
    target: Literal["reference", "answers"] = "reference"
    """What the policy learns at an answer token. `reference`: the reference's distribution, by the KL
    divergence, as published. `answers`: the token of the record, by cross entropy, as in SFT; it is there to
    compare. Validation measures the KL to the reference with both."""
    loss_reduction: Literal["sample", "token", "square"] = "sample"
    """How the answer tokens of a step are weighted in its loss. With kl_i the KL divergence (or cross
    entropy, see `target`) at answer token i in nats, N_s the number of answer tokens of sample s, and S the
    number of samples in the step: `sample` is 1/S sum_s 1/N_s sum_i kl_i, so that samples count alike (the
    formula of the ViCO paper); `token` is sum_s sum_i kl_i / sum_s N_s, so that answer tokens count alike;
    `square` is sum_s N_s^-1/2 sum_i kl_i / sum_s N_s^1/2, in between (as in InternVL's SFT). Samples without
    answer tokens do not count."""
    reference_tokens_per_pack: int = Field(32768, gt=0)
    """Largest number of tokens in a pack, counted with all tiles at the full rate. A longer sample is
    refused."""
    tiles_per_pack: int = Field(96, gt=0)
    """Largest number of tiles in a pack."""
    packs_per_step: int = Field(8, gt=0)
    """Number of packs per update, over all ranks. With fewer packs than `resources.workers` the stage is
    refused."""
    window_samples: int = Field(4096, gt=0)
    """Number of samples that are shuffled, packed and balanced together."""
    epochs: float = Field(1.0, gt=0)
    """Number of passes over the training samples; may be a fraction."""
    max_steps: int = Field(0, ge=0)
    """Largest number of updates; 0: only `epochs` decides."""
    validate_every_steps: int = Field(100, gt=0)
    """Number of updates from one validation to the next. The last update is always followed by one."""
    validation_packs: int = Field(8, gt=0)
    """Largest number of packs of calibration samples per validation, evenly spread over them."""
    select: Literal["last", "best"] = "last"
    """The policy that is published: that of the last step, or that of the validation with the lowest KL."""

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


class JointOptimizer(ConsistencyOptimizer):
    """AdamW as for the first consistency training, from a lower learning rate."""

    learning_rate: float = Field(4e-5, gt=0)
    """Highest learning rate, reached at the end of the warm-up; half of `consistency.optimizer.learning_rate`
    if the file leaves it out."""


class JointConsistencyConfig(ConsistencyConfig):
    """Consistency training that continues from the first policy, at the rates that the router chooses.

    Keys that the file leaves out have their value from `consistency`, except as stated.
    """

    optimizer: JointOptimizer = JointOptimizer()
    random_share: float = Field(0.25, ge=0, le=1)
    """Share of the tiles (or images, see `rate_unit`) whose rate is drawn with `compress_share` as in the
    first training; the others have the rate that the router chooses at its threshold. Some randomness keeps
    the policy able to answer at other rates, which the losses of tiles and other thresholds need."""

    @model_validator(mode="after")
    def connector_is_trained(self) -> "JointConsistencyConfig":
        for field in ("connector_start", "connector_warmup_steps"):
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default:
                raise ValueError(
                    f"{field}={value} has no effect, as the policy has a trained compressed connector; "
                    "leave it out"
                )
        return self
