"""The config of the ratio stage."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from stages.inference import Dtype
from stages.stage_config import StageConfig

Isolation = Literal["tile", "image", "random"]


class RatioConfig(StageConfig):
    """Losses of the policy against the reference, with each tile at both rates."""

    LEFT_OUT: ClassVar[Mapping[str, Any]] = {"max_samples": 0, "dtype": "float32"}

    seed: int = Field(ge=0)
    """Seed of the choice of samples and of random masks."""
    splits: tuple[Literal["train", "calib", "test"], ...] = ("train", "calib", "test")
    """The splits whose tiles get losses. train is required, because tau comes from train tiles."""
    max_samples: int = Field(20_000, ge=0)
    """Largest number of samples per split, drawn by seed. 0: all."""
    max_test_samples: int | None = Field(None, ge=0)
    """Largest number of test samples, instead of `max_samples`. Labels come from train tiles, the threshold
    from calib tiles, and test tiles only measure the router: `evaluate.max_samples` of them are enough, drawn
    by the same seed. 0: all."""
    sources: tuple[str, ...] = ()
    """Sources of the train samples that get losses, as the shards name them. Empty: all. Calib and test
    samples are not chosen by source or kind, as threshold and scores are for all of them."""
    kinds: tuple[str, ...] = ()
    """Kinds of the train samples that get losses, such as ocr. Empty: all."""
    isolation: Isolation = "tile"
    """How the effect of one tile is isolated. `tile`: only that tile is compressed. `image`: all tiles of its
    picture are compressed and share one loss. `random`: the tile's effect is estimated by ridge regression
    from the losses of `masks` random masks, in which other tiles are compressed, too."""
    masks: int = Field(24, ge=4)
    """Random masks per sample with isolation `random`, which also has the vector without a compressed tile.
    `tile` has one vector per tile and one more."""
    compress_share: float = Field(0.5, gt=0, lt=1)
    """Share of a sample's tiles that each random mask compresses: the share that the router is wanted to
    compress."""
    ridge: float = Field(0.5, gt=0)
    """Penalty of the ridge regression, in units of masks."""
    dtype: Dtype | None = None
    """Data type of the weights and activations of policy and reference. null: bfloat16 if the stage uses GPUs
    (`resources.gpus_per_worker` of the site), float32 on CPUs; the record names it."""

    @field_validator("splits")
    @classmethod
    def _train_is_there(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if "train" not in splits or len(set(splits)) != len(splits):
            raise ValueError("needs train, and no split twice: tau comes from train tiles")
        return splits

    def budget(self, split: str) -> tuple[str, int]:
        """Return the field that limits the samples of a split, and its value; 0: all."""
        if split == "test" and self.max_test_samples is not None:
            return "max_test_samples", self.max_test_samples
        return "max_samples", self.max_samples

    @model_validator(mode="after")
    def _settings_take_effect(self) -> "RatioConfig":
        if self.max_test_samples is not None and "test" not in self.splits:
            raise ValueError(
                f"max_test_samples={self.max_test_samples} has no effect with "
                f"splits={','.join(self.splits)}; set it to null, or add test to splits"
            )
        if self.isolation != "random":
            for field in ("masks", "compress_share", "ridge"):
                value, default = getattr(self, field), type(self).model_fields[field].default
                if value != default:
                    raise ValueError(
                        f"{field}={value} has no effect with isolation={self.isolation}; leave it out, or "
                        "set isolation: random"
                    )
            return self
        rarer = min(self.compress_share, 1 - self.compress_share)
        if self.masks * rarer < 2:
            raise ValueError(
                f"masks={self.masks} is too few for compress_share={self.compress_share:g}, as each tile "
                f"needs masks with both rates; set at least {-int(-2 // rarer)} masks"
            )
        return self
