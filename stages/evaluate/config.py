"""The config of the evaluate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from stages.inference import Dtype
from stages.stage_config import StageConfig

BLOCK_SAMPLES = 16
"""Samples of a part: few enough that a killed stage loses little, enough for full batches."""


class EvaluateConfig(StageConfig):
    """Config of the evaluate stage."""

    seed: int | None = None
    max_samples: int = Field(0, ge=0)
    """Test samples, drawn by seed; 0: all."""
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of calibration tiles whose thresholds the router is measured at, beside its calibrated one."""
    relative_threshold: float = Field(0.0, ge=0, lt=1)
    """Of the published rule, in the entry `served`."""
    controls: tuple[Literal["random", "shuffled", "pixel_rule", "oracle"], ...] = (
        "random",
        "shuffled",
        "pixel_rule",
        "oracle",
    )
    num_replicates: int = Field(3, ge=2)
    """Draws of the controls that are drawn."""
    num_resamples: int = Field(1000, ge=100)
    """Bootstrap resamples of the test samples, for the 95 % intervals."""
    max_new_tokens: int = Field(64, ge=1)
    dtype: Dtype = "float32"

    @field_validator("shares")
    @classmethod
    def _shares_are_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < share < 1 for share in shares):
            raise ValueError("every share must lie between 0 and 1; both ends are measured anyway")
        return shares
