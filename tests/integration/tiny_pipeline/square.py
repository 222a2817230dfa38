"""Second stage: the squares."""

from stages.context import Context
from stages.stage_config import StageConfig
from tests.integration.tiny_pipeline.parted import write_part

CODE_VERSION = 1
INPUTS = ("draw",)
NEEDS_RAY = False


class SquareConfig(StageConfig):
    power: int = 2


Config = SquareConfig


def run(config: SquareConfig, context: Context) -> dict[str, float | int | str]:
    paths = sorted(context.folder("draw").glob("part-*.txt"))
    for number, path in enumerate(paths):
        write_part(
            context,
            number,
            "\n".join(str(float(line) ** config.power) for line in path.read_text().split()),
        )
    return {"parts": len(paths)}
