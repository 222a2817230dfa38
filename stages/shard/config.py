"""The config of the shard stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.stage_config import StageConfig
from vico.special_tokens import IMAGE_MARK, PROMPT_TOKENS


class ShardConfig(StageConfig):
    """How records become shards: their size, the split, the limits and checks of a row."""

    samples_per_shard: int = Field(1000, ge=1, le=1_000_000)
    """Lines per shard; one task writes one shard. Quarantined lines make a shard smaller."""
    calib_share: float = Field(0.1, ge=0, lt=1)
    """Share of groups in calib, the split for validation, the routing threshold and the pixel rule."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of groups in test, the split of every reported number. With held-out records those are the test
    split, and this share stays in train.
    """
    split_seed: int = Field(0, ge=0)
    """Seed that assigns groups, pictures and keys to the splits; the pipeline's `seed` has no effect on it.
    Another seed gives another split of the same samples and changes nothing else, except which rows straddle
    the split because a group or a held-out row contradicts a picture that they share.
    """
    max_tiles: int = Field(12, ge=1, le=1024)
    """Most tiles per row, thumbnails not counted, divided among its pictures. `max_dynamic_patch` of a set
    overrides it, and the model's own limit holds for both.
    """
    max_pixels: int = Field(89_478_485, ge=1, le=178_956_970)
    """Most pixels per picture. Above the default Pillow warns of a decompression bomb, above the largest
    value it refuses the picture.
    """
    max_tokens: int = Field(8192, ge=2)
    """Most tokens per row: its text, and all its tiles at the full rate."""
    verify: Literal["decode", "header"] = "decode"
    """`decode` decodes every picture and rejects damaged ones; `header` is faster, but a damaged picture then
    stops the stage that reads it.
    """
    system_message: str = Field("", max_length=10_000)
    """System message for conversations that have none; empty adds none. Its tokens count in `max_tokens`."""

    @field_validator("system_message")
    @classmethod
    def system_message_is_text(cls, value: str) -> str:
        for mark in (IMAGE_MARK, *PROMPT_TOKENS):
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
