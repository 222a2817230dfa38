"""The config of the router stage."""

from pydantic import Field

from stages.stage_config import StageConfig
from stages.training.optimizer import OptimizerConfig


class RouterConfig(StageConfig):
    """Training of the router on the labels of tiles, and calibration of its threshold."""

    seed: int = Field(ge=0)
    """Seed of the router's initial weights, the order of the samples and dropout. A pipeline file may leave
    it out; the stage then uses the pipeline's seed."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate schedule."""
    tiles_per_pack: int = Field(64, gt=0)
    """Most tiles in a pack, the part of a batch that one device processes at a time."""
    packs_per_step: int = Field(4, gt=0)
    """Packs per update, over all workers. There can be at most this many workers."""
    window_samples: int = Field(4096, gt=0)
    """Samples are shuffled, packed and balanced within windows of this many."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the labelled train samples; fractions are possible."""
    max_steps: int = Field(0, ge=0)
    """Most updates. 0: only `epochs` limits them."""
    validate_every_steps: int = Field(100, gt=0)
    """Updates from one validation on calibration tiles to the next."""
    validation_packs: int = Field(64, gt=0)
    """Packs of calibration tiles in a validation, evenly spread over the split. Threshold and scores use all
    tiles."""
    compress_share: float | None = Field(None, ge=0, le=1)
    """Share of calibration tiles that the calibrated threshold compresses. null: the share that their labels
    compress."""
