"""Which stages would run, and why: the action, fingerprint and reasons of every stage.

Used by `vico plan` and the runner. It only reads, and imports nothing heavy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.planning.reasons import changes, code_changes
from pipeline.planning.stage_status import task_status
from pipeline.planning.tasks import Pipeline, StageTask
from stages.adopted import AdoptedConfig
from vico.errors import UserError


@dataclass(frozen=True)
class PlannedStage:
    """One stage of `vico plan`: whether it is reused or run, and why."""

    stage: str
    action: Literal["reuse", "run"]
    fingerprint: str
    """Empty: not known, as the model's files are not here."""
    reasons: list[str]
    refused: str | None = field(default=None)
    """Why the stage cannot run before the user has decided something; None if it can."""

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "action": self.action,
            "fingerprint": self.fingerprint or None,
            "reasons": self.reasons,
        }


def plan(
    pipeline: Pipeline, storage: Path, forced: Iterable[str] = (), *, strict_code: bool = False
) -> list[PlannedStage]:
    """Return the plan of every stage, in order. The stages in `forced` run in any case."""
    forced = set(forced)
    output_digests: dict[str, str | None] = dict(pipeline.sources)
    planned = []
    for task in pipeline.tasks:
        if task.name in forced:
            stage, output_digest = PlannedStage(task.name, "run", task.fingerprint, ["--force"]), None
        else:
            inputs = {name: output_digests[name] for name in task.inputs}
            stage, output_digest = _planned(task, storage, inputs, strict_code)
        planned.append(stage)
        output_digests[task.name] = output_digest
    return planned


def _planned(
    task: StageTask, storage: Path, inputs: Mapping[str, str | None], strict_code: bool
) -> tuple[PlannedStage, str | None]:
    """Return the stage's plan and the digest of its output, None if that is not known before it runs."""
    try:
        status = task_status(task, storage, inputs, strict_code=strict_code)
    except UserError as error:
        return PlannedStage(task.name, "run", task.fingerprint, [str(error)], refused=str(error)), None
    if status.kind == "reuse" and status.record is not None:
        reasons = [status.reason, *code_changes(task, status.record)]
        return PlannedStage(task.name, "reuse", task.fingerprint, reasons), status.record.output_digest
    reasons = [status.reason] if status.reason else changes(task, storage)
    if isinstance(task.config, AdoptedConfig):
        reasons = [f"adopted from {task.adopted_from}, digest {task.config.digest[:12]}", *reasons]
    return PlannedStage(task.name, "run", task.fingerprint, reasons), None
