"""First stage: random numbers from a seed."""

import random

from pydantic import Field

from stages.context import Context
from stages.stage_config import StageConfig
from tests.integration.tiny_pipeline.parted import write_part

CODE_VERSION = 1
INPUTS = ("records", "heldout")
NEEDS_RAY = False


class DrawConfig(StageConfig):
    seed: int
    num_parts: int = Field(4, ge=1)
    scale: float = Field(1.0, gt=0)


Config = DrawConfig


def run(config: DrawConfig, context: Context) -> dict[str, float | int | str]:
    for number in range(config.num_parts):
        numbers = random.Random(f"{config.seed}/{number}")
        write_part(context, number, "\n".join(str(config.scale * numbers.random()) for _ in range(50)))
    return {"parts": config.num_parts}
