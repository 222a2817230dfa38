"""A branch beside `square` that does the same with another power."""

from stages.stage_config import StageConfig
from tests.integration.tiny_pipeline import square

CODE_VERSION = 1
INPUTS = ("draw",)
NEEDS_RAY = False
run = square.run


class CubeConfig(StageConfig):
    power: int = 3


Config = CubeConfig
