"""The ratio stage by itself, with any number of actors; also as a program that takes JOB.json."""

import json
import sys
from pathlib import Path
from typing import Any

from cluster.ray_session import ray_session
from cluster.settings.blocks import RaySettings, Resources
from stages.ratio import stage as ratio
from tests.stage_context import stage_context


def run_ratio(
    inputs: dict[str, Path], store: Path, actors: int, config: ratio.RatioConfig, attempt: int = 1
) -> bytes:
    """Run the stage in `store` and return the bytes of its table."""
    context = stage_context("ratio", store, inputs, attempt)
    resources = Resources(workers=1, tasks=1, actors=actors, max_retries=5)
    context.site = context.site.model_copy(
        update={"resources": resources, "ray": RaySettings(num_cpus=actors)}
    )
    with ray_session(context.site):
        ratio.run(config, context)
    return (context.parts.output / "ratios.parquet").read_bytes()


def main(job: dict[str, Any]) -> None:
    inputs = {name: Path(folder) for name, folder in job["inputs"].items()}
    run_ratio(inputs, Path(job["store"]), job["actors"], ratio.RatioConfig(**job["config"]))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
