"""The config of the rates stage."""

from pydantic import Field

from stages.inference import Dtype
from stages.stage_config import StageConfig


class RatesConfig(StageConfig):
    """The rates of all train tiles by the first router, at its calibrated threshold."""

    dtype: Dtype = Field("float32")
    """Data type of the weights and activations of vision tower and router; bfloat16 is faster on CUDA."""
