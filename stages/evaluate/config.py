"""The config of the evaluate stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from stages.controls import ControlName
from stages.inference import Dtype
from stages.stage_config import StageConfig

BLOCK_SAMPLES = 16
"""Samples per part: few enough that a killed stage loses little, enough for full batches."""


class EvaluateConfig(StageConfig):
    """Quality against visual tokens on the test samples, for the router and its controls."""

    LEFT_OUT: ClassVar[Mapping[str, Any]] = {"max_samples": 0, "dtype": "float32"}

    seed: int = Field(ge=0)
    """Seed of the choice of samples, of the controls that are drawn and of the bootstrap. A pipeline file may
    leave it out; the stage then uses the pipeline's seed."""
    max_samples: int = Field(2_000, ge=0)
    """Largest number of test samples, drawn by seed. 0: all."""
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of calibration tiles to compress. Each gives a threshold at which the router is measured, in
    addition to its calibrated one."""
    relative_threshold: float = Field(0.0, ge=0, lt=1)
    """Relative threshold of the published Flash models; it changes only the points under `served`. That rule
    compresses a tile if its probability to compress is at least the calibrated threshold and above this
    quantile of the probabilities of all tiles of the prompt. 0.0, the value in a Flash export, keeps only the
    tile with the lowest probability."""
    controls: tuple[ControlName, ...] = (
        "random",
        "shuffled",
        "pixel_rule",
        "blind_oracle",
        "oracle",
        "fewer_tiles",
    )
    """The controls to measure, most at the router's number of tokens: random tiles, the router's decisions
    shuffled among samples, tiles that score lowest in a rule on pixel measures, tiles with the smallest loss
    ratios over other questions about the picture (`blind_oracle`) or over the sample's own (`oracle`).
    `fewer_tiles` cuts pictures into fewer tiles and keeps all of them at the full rate."""
    fewer_tiles: tuple[int, ...] = (1, 2, 3, 4, 6, 9)
    """Most tiles per picture of the control `fewer_tiles`, in place of `shard.max_tiles`."""
    wanted_quality: float | None = Field(None, gt=0, le=1)
    """Share of the reference's similarity that the router must keep on calibration samples. The threshold
    that saves the most tokens under this condition replaces the router stage's one, here and in the export.
    null: the router stage's threshold."""
    num_replicates: int = Field(3, ge=2)
    """Number of draws of each random control (`random`, `shuffled`); its points are means over them."""
    num_resamples: int = Field(1000, ge=100)
    """Number of bootstrap resamples of the test samples, for the 95 % intervals."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer in tokens; a longer one is cut and counted as truncated."""
    dtype: Dtype | None = None
    """Data type of the weights and activations of policy and reference. null: bfloat16 if the stage uses GPUs
    (`resources.gpus_per_worker` of the site), float32 on CPUs; the record names it."""

    @field_validator("fewer_tiles")
    @classmethod
    def _tiles_are_positive(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if any(number < 1 for number in numbers):
            raise ValueError("every number of tiles must be at least 1")
        return numbers

    @field_validator("shares")
    @classmethod
    def _shares_are_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < share < 1 for share in shares):
            raise ValueError("every share must be between 0 and 1; 0 and 1 themselves are always measured")
        return shares
