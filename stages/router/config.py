"""The config of the router stage."""

from pydantic import Field

from stages.stage_config import StageConfig
from stages.training.optimizer import OptimizerConfig


class RouterConfig(StageConfig):
    """What the router is trained on and how; every field changes the result."""

    seed: int | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    tiles_per_pack: int = Field(64, gt=0)
    packs_per_step: int = Field(4, gt=0)
    window_samples: int = Field(4096, gt=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0)
    """0: no limit but `epochs`."""
    validate_every_steps: int = Field(100, gt=0)
    validation_packs: int = Field(64, gt=0)
    """Packs of calibration tiles for the curve, evenly spread; threshold and scores see all tiles."""
    compress_share: float | None = Field(None, ge=0, le=1)
    """Share of calibration tiles that the threshold compresses; null: the share their labels compress."""
