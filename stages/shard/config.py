"""The config of the shard stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.stage_config import StageConfig
from vico.settings import IMAGE_END, IMAGE_MARK, IMAGE_START, IMAGE_TOKEN, TURN_END, TURN_START


class ShardConfig(StageConfig):
    """Config of the shard stage."""

    samples_per_shard: int = Field(1000, ge=1, le=1_000_000)
    """Lines a shard is made of; those that are quarantined leave it smaller."""
    calib_share: float = Field(0.1, ge=0, lt=1)
    test_share: float = Field(0.1, ge=0, lt=1)
    """With held-out records these are the test split, and this share stays with train."""
    split_seed: int = Field(0, ge=0)
    max_tiles: int = Field(12, ge=1, le=1024)
    """Most tiles of a row, thumbnails not counted, shared by its pictures; a set's max_dynamic_patch goes
    before it.
    """
    max_pixels: int = Field(89_478_485, ge=1, le=178_956_970)
    """Most pixels of a picture; the default is where Pillow starts to warn, the limit where it refuses."""
    max_tokens: int = Field(8192, ge=2)
    """Most tokens of a row, text and all tiles at the full rate."""
    verify: Literal["decode", "header"] = "decode"
    """Whether every picture is decoded whole, or only its header is read."""
    system_message: str = Field("", max_length=10_000)
    """Put before conversations that bring no system message; empty: nothing is put there."""

    @field_validator("system_message")
    @classmethod
    def system_message_is_text(cls, value: str) -> str:
        for mark in (IMAGE_MARK, IMAGE_START, IMAGE_TOKEN, IMAGE_END, TURN_START, TURN_END):
            if mark in value:
                raise ValueError(f"{mark} is written by the prompt itself; leave it out")
        return value

    @model_validator(mode="after")
    def train_is_left(self) -> Self:
        if self.calib_share + self.test_share >= 1:
            raise ValueError(
                f"calib_share={self.calib_share} and test_share={self.test_share} leave nothing for train; "
                "their sum must be below 1"
            )
        return self
