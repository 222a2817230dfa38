"""A plain context to run one stage alone, without a runner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.settings.blocks import RaySettings, Resources
from cluster.site import Site
from data_prep.records.config import RecordsConfig
from data_prep.records.repairs import Repairs
from stages.context import Context
from stages.parts import Parts


@dataclass
class StageContext(Context):
    """Gives a stage its inputs and keeps what it reports."""

    stage: str
    parts: Parts
    inputs: Mapping[str, Any]
    site: Site
    metrics: dict[str, float] = field(default_factory=dict)
    reported: list[str | tuple[int, int, str]] = field(default_factory=list)

    @property
    def records(self) -> RecordsConfig:
        return self.inputs["records"]

    @property
    def heldout(self) -> RecordsConfig | None:
        return self.inputs.get("heldout")

    @property
    def repaired(self) -> Repairs | None:
        return self.inputs.get("repaired")

    def folder(self, name: str) -> Path:
        return self.inputs[name]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.update(metrics)

    def progress(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        self.reported.append((done, total, unit))

    def note(self, text: str) -> None:
        self.reported.append(text)

    def check(self) -> None:
        pass


def stage_context(stage: str, folder: Path, inputs: Mapping[str, Any], attempt: int = 1) -> StageContext:
    """Return a context whose output is `folder/<stage>/output`, on a site of two CPUs."""
    site = Site(
        storage=folder, ray=RaySettings(num_cpus=2), resources=Resources(workers=2, actors=2, tasks=2)
    )
    parts = Parts(folder / stage, attempt)
    parts.output.mkdir(parents=True, exist_ok=True)
    return StageContext(stage, parts, inputs, site)
