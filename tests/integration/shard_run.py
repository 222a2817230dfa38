"""The shard stage by itself, with a plain context; also as a program that takes JOB.json."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.settings.blocks import RaySettings, Resources
from cluster.site import Site
from data_prep.records.config import RecordsConfig
from data_prep.records.repairs import Repairs
from data_prep.shards.folder import Manifest
from stages.parts import Parts
from stages.shard.config import ShardConfig
from stages.shard.stage import run


@dataclass
class StageContext:
    """The context of a stage without a runner; it keeps what the stage reports."""

    parts: Parts
    inputs: dict[str, Any]
    site: Site
    stage: str = "shard"
    reported: list[tuple[int, int, str] | str] = field(default_factory=list)
    num_checks: int = 0

    @property
    def records(self) -> RecordsConfig:
        return self.inputs["records"]

    @property
    def heldout(self) -> RecordsConfig | None:
        return self.inputs["heldout"]

    @property
    def repaired(self) -> Repairs | None:
        return self.inputs["repaired"]

    def folder(self, name: str) -> Path:
        return self.inputs[name]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        raise AssertionError("the shard stage has no metrics by step")

    def progress(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        self.reported.append((done, total, unit))

    def note(self, text: str) -> None:
        self.reported.append(text)

    def check(self) -> None:
        self.num_checks += 1


def site_with(tasks: int) -> Site:
    return Site(ray=RaySettings(num_cpus=2), resources=Resources(tasks=tasks))


def context_of(
    folder: Path,
    model: Path,
    records: RecordsConfig,
    heldout: RecordsConfig | None = None,
    repaired: Repairs | None = None,
    attempt: int = 1,
) -> StageContext:
    """Return the context of an attempt that writes below `folder`, with two tasks at a time."""
    inputs = {"records": records, "heldout": heldout, "tokenizer": model, "repaired": repaired}
    return StageContext(Parts(folder, attempt), inputs, site_with(2))


def internvl(path: Path) -> RecordsConfig:
    return RecordsConfig(format="internvl", path=path)


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of the output by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "output").rglob("*"))
        if path.is_file()
    }


def manifest(folder: Path) -> Manifest:
    return json.loads((folder / "output" / "manifest.json").read_text())


def main(job: dict[str, Any]) -> None:
    records = RecordsConfig(format="internvl", path=job["meta"])
    repaired = job.get("repaired")
    repairs = None if repaired is None else Repairs(Path(repaired["file"]), Path(repaired["base"]), "base")
    context = context_of(Path(job["folder"]), Path(job["model"]), records, repaired=repairs)
    run(ShardConfig(**job["config"]), context)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
