"""The config of the ratio stage."""

from typing import Literal

from pydantic import Field, field_validator

from stages.inference import Dtype
from stages.stage_config import StageConfig


class RatioConfig(StageConfig):
    """Config of the ratio stage."""

    seed: int | None = None
    splits: tuple[Literal["train", "calib", "test"], ...] = ("train", "calib", "test")
    max_samples: int = Field(0, ge=0)
    """Samples of each split, drawn by seed; 0: all."""
    unit: Literal["tile", "image"] = "tile"
    """What is compressed for one loss: one tile with all others at the full rate, or all tiles of one
    image.
    """
    dtype: Dtype = "float32"

    @field_validator("splits")
    @classmethod
    def _train_is_there(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if "train" not in splits or len(set(splits)) != len(splits):
            raise ValueError("needs train, and no split twice: tau comes from train tiles")
        return splits
