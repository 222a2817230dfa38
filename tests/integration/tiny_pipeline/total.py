"""Last stage: one number, and a folder as a part."""

import shutil

from stages.context import Context
from stages.stage_config import StageConfig

CODE_VERSION = 1
INPUTS = ("draw", "square")
NEEDS_RAY = False


class TotalConfig(StageConfig):
    digits: int = 6


Config = TotalConfig


def run(config: TotalConfig, context: Context) -> dict[str, float | int | str]:
    from tests.integration.tiny_pipeline.parted import write_part

    lines = [
        line for path in context.folder("square").glob("part-*.txt") for line in path.read_text().split()
    ]
    total = round(sum(sorted(float(line) for line in lines)), config.digits)
    write_part(context, 0, f"{total}\n")
    if not context.parts.done("copy"):
        shutil.rmtree(context.parts.partial("copy"), ignore_errors=True)
        shutil.copytree(context.folder("draw"), context.parts.partial("copy"))
        context.parts.publish("copy")
    context.parts.write_json("total.json", {"total": total})
    return {"total": total}
