"""The config of the label stage."""

from pydantic import Field

from stages.stage_config import StageConfig


class LabelConfig(StageConfig):
    """From the loss ratios of tiles to the labels keep and compress."""

    seed: int = Field(ge=0)
    """Seed of the order in which train tiles are labelled. A pipeline file may leave it out; the stage then
    uses the pipeline's seed."""
    floor: float = Field(1e-2, ge=0)
    """Added to both losses of a ratio, in nats per answer token, so that tiny losses do not decide."""
    percentile: float = Field(50.0, gt=0, lt=100)
    """The threshold tau is this percentile of the ratios in the window. The labels compress about this
    percentage of the tiles."""
    window_tiles: int = Field(10_000, ge=1)
    """Number of train tiles in the sliding window that tau is taken from."""
