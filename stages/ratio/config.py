"""The config of the ratio stage."""

from typing import Literal

from pydantic import Field, field_validator

from stages.inference import Dtype
from stages.stage_config import StageConfig

Unit = Literal["tile", "image"]


class RatioConfig(StageConfig):
    """Losses of the policy against the reference, with each tile at both rates."""

    seed: int = Field(ge=0)
    """Seed of the choice of samples."""
    splits: tuple[Literal["train", "calib", "test"], ...] = ("train", "calib", "test")
    """The splits whose tiles get losses. train is required, because tau comes from train tiles."""
    max_samples: int = Field(0, ge=0)
    """Number of samples per split, drawn by seed. 0: all."""
    unit: Unit = "tile"
    """What is compressed for one loss: one tile with all others at the full rate, or all tiles of one
    image."""
    dtype: Dtype = "float32"
    """Data type of the weights and activations of policy and reference; bfloat16 is faster on CUDA."""

    @field_validator("splits")
    @classmethod
    def _train_is_there(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if "train" not in splits or len(set(splits)) != len(splits):
            raise ValueError("needs train, and no split twice: tau comes from train tiles")
        return splits
