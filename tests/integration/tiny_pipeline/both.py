"""The stage that reads both branches."""

from stages.context import Context
from stages.stage_config import StageConfig
from tests.integration.tiny_pipeline.parted import write_part

CODE_VERSION = 1
INPUTS = ("square", "cube")
NEEDS_RAY = False


class BothConfig(StageConfig):
    """Has no fields."""


Config = BothConfig


def run(config: BothConfig, context: Context) -> dict[str, float | int | str]:
    texts = [path.read_text() for name in INPUTS for path in sorted(context.folder(name).glob("part-*.txt"))]
    write_part(context, 0, "\n".join(texts))
    return {"files": len(texts)}
