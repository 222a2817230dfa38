"""A plain context for running one stage by itself, without a runner."""

from dataclasses import dataclass, field
from pathlib import Path

from cluster.site import RaySettings, Resources, Site
from stages.parts import Parts


@dataclass
class StageContext:
    """What a stage needs of a runner; keeps what was reported."""

    stage: str
    parts: Parts
    inputs: dict
    site: Site
    metrics: dict[str, float] = field(default_factory=dict)
    reported: list = field(default_factory=list)

    def log(self, metrics, step):
        self.metrics.update(metrics)

    def progress(self, done, total, unit):
        self.reported.append((done, total, unit))

    def note(self, text):
        self.reported.append(text)

    def check(self):
        pass


def stage_context(stage: str, folder: Path, inputs: dict, attempt: int = 1) -> StageContext:
    """A context whose output is `folder/<stage>/output`, on a site of two CPUs."""
    site = Site(
        storage=folder, ray=RaySettings(num_cpus=2), resources=Resources(workers=2, actors=2, tasks=2)
    )
    parts = Parts(folder / stage, attempt)
    parts.output.mkdir(parents=True, exist_ok=True)
    return StageContext(stage, parts, inputs, site)
