"""The shard stage by itself, with a plain context; also as a program: JOB.json."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cluster.site import RaySettings, Resources, Site
from data_prep.records.config import RecordsConfig
from data_prep.records.repairs import Repairs
from stages.parts import Parts
from stages.shard.config import ShardConfig
from stages.shard.stage import run


@dataclass
class StageContext:
    """What the stage needs of a runner; keeps what was reported."""

    parts: Parts
    inputs: dict
    site: Site
    stage: str = "shard"
    reported: list = field(default_factory=list)
    num_checks: int = 0

    def log(self, metrics, step):
        raise AssertionError("the shard stage has no metrics by step")

    def progress(self, done, total, unit):
        self.reported.append((done, total, unit))

    def note(self, text):
        self.reported.append(text)

    def check(self):
        self.num_checks += 1


def site_with(tasks: int) -> Site:
    return Site(ray=RaySettings(num_cpus=2), resources=Resources(tasks=tasks))


def context_of(
    folder: Path,
    model: Path,
    records: RecordsConfig,
    heldout: RecordsConfig | None = None,
    tasks: int = 2,
    attempt: int = 1,
    repaired: Repairs | None = None,
) -> StageContext:
    inputs = {"records": records, "heldout": heldout, "tokenizer": model, "repaired": repaired}
    return StageContext(Parts(folder, attempt), inputs, site_with(tasks))


def main(job: dict) -> None:
    records = RecordsConfig(format="internvl", path=job["meta"])
    repaired = job.get("repaired")
    repairs = None if repaired is None else Repairs(Path(repaired["file"]), Path(repaired["base"]), "base")
    context = context_of(Path(job["folder"]), Path(job["model"]), records, repaired=repairs)
    run(ShardConfig(**job["config"]), context)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
