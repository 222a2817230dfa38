"""Which stages would run, and why: every stage's identity, how it stands in the store, and what changed.

Used by `vico plan` and the runner. Reads only, and imports nothing heavy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.planning.reasons import changes, code_changes
from pipeline.planning.standing import task_standing
from pipeline.planning.tasks import Pipeline, StageTask
from vico.errors import UserError


@dataclass(frozen=True)
class PlannedStage:
    """A stage of `vico plan`."""

    stage: str
    action: Literal["reuse", "run"]
    fingerprint: str
    reasons: list[str]
    refused: str | None = field(default=None)
    """Why the stage cannot run before the user has decided something."""

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "action": self.action,
            "fingerprint": self.fingerprint,
            "reasons": self.reasons,
        }


def plan(
    pipeline: Pipeline, storage: Path, forced: Iterable[str] = (), *, strict_code: bool = False
) -> list[PlannedStage]:
    """Every stage in order with its action and the reasons; `forced` are the stages to run in any case."""
    forced = set(forced)
    outputs: dict[str, str | None] = dict(pipeline.sources)
    planned = []
    for task in pipeline.tasks:
        inputs = {name: outputs[name] for name in task.inputs}
        one, outputs[task.name] = _planned(task, storage, inputs, task.name in forced, strict_code)
        planned.append(one)
    return planned


def _planned(
    task: StageTask, storage: Path, inputs: Mapping[str, str | None], forced: bool, strict_code: bool
) -> tuple[PlannedStage, str | None]:
    """The stage's plan and the digest of its output, None if that is not known yet."""
    if forced:
        return PlannedStage(task.name, "run", task.fingerprint, ["--force"]), None
    try:
        found = task_standing(task, storage, inputs, strict_code=strict_code)
    except UserError as error:
        return PlannedStage(task.name, "run", task.fingerprint, [str(error)], refused=str(error)), None
    if found.way == "reuse" and found.record is not None:
        reasons = [found.reason, *code_changes(task, found.record)]
        return PlannedStage(task.name, "reuse", task.fingerprint, reasons), found.record.output_digest
    reasons = [found.reason] if found.reason else changes(task, storage)
    if task.adopted_from is not None:
        reasons = [f"adopted from {task.adopted_from}, digest {task.config.digest[:12]}", *reasons]
    return PlannedStage(task.name, "run", task.fingerprint, reasons), None
