"""The status of a stage in the store: reusable, unfinished, changed or not started, and why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.planning.reasons import (
    attempts_with_parts,
    changed_packages,
    changed_since,
    changed_sources,
    mixed_code,
    shortened,
)
from pipeline.planning.tasks import StageTask
from pipeline.results.records import AttemptFile, Record
from pipeline.results.stage_folder import NO_DAMAGE, Damage, StageFolder


@dataclass(frozen=True)
class StageStatus:
    """What the store holds of a stage, and so what a run does with it.

    - reuse: done, and nothing has changed.
    - new: nothing is there.
    - resume: unfinished; its parts are kept.
    - rebuild: done once, but outputs are missing or damaged; only these are made again.
    - restart: the output was made from other bytes, or nothing says from which; it is archived.
    - unknown: done once, but a stage that it reads runs first.
    """

    kind: Literal["reuse", "new", "resume", "rebuild", "restart", "unknown"]
    record: Record | None = None
    reason: str = ""
    damage: Damage = NO_DAMAGE
    expected: tuple[str, ...] = ()
    """Outputs that the next attempt must make: a record names them, and they are missing or damaged."""


def stage_status(folder: StageFolder, inputs: Mapping[str, str | None]) -> StageStatus:
    """Return the status of a stage, given the digests of its inputs as they are now (None: not known yet).

    Raises UserError when a file of the store is damaged in such a way that only the user can decide.
    """
    record = folder.record()
    if record is None:
        return _unfinished(folder, inputs)
    folder.refuse_edited(record)
    if None in inputs.values():
        run_first = ", ".join(name for name, digest in inputs.items() if digest is None)
        return StageStatus("unknown", record, f"runs after {run_first}, unless the output stays the same")
    changed = _changed_inputs(record.inputs, inputs)
    if changed:
        return StageStatus("restart", record, f"input bytes changed: {changed}")
    damage = folder.damage(record)
    if damage:
        names = (*damage.missing, *damage.resized)
        return StageStatus("rebuild", record, f"{damage}; to be rebuilt", damage, names)
    return StageStatus("reuse", record, f"done in run {record.run}")


def task_status(
    task: StageTask, storage: Path, inputs: Mapping[str, str | None], *, strict_code: bool
) -> StageStatus:
    """Return the status of a stage of a pipeline; raises what `stage_status` raises.

    Source files, and packages that the stage imports, may have changed under the same fingerprint. With
    `strict_code` such a stage is restarted; without it, it is reused or resumed, and the reason says so. For
    a stage that resumes the reason names changes of all packages.
    """
    folder = task.folder(storage)
    status = stage_status(folder, inputs)
    if status.kind == "reuse" and status.record is not None:
        changed = changed_since(task, status.record)
        mixed = mixed_code(status.record, of_module=task.spec.module_name)
    elif status.kind == "resume":
        attempts = attempts_with_parts(folder)
        changed, mixed = _first(changed_since(task, attempt) for attempt in attempts), ""
        said = _first(_all_changes(task, attempt) for attempt in attempts)
        if said:
            reason = f"{status.reason}; {said} changed since, and its parts are kept"
            status = replace(status, reason=reason)
    else:
        return status
    if strict_code and (changed or mixed):
        reason = f"{changed} changed since" if changed else mixed
        return StageStatus("restart", status.record, f"{reason} (--strict-code)")
    return status


def _all_changes(task: StageTask, attempt: AttemptFile) -> str:
    """Return the source files and packages that changed since an attempt, else ""."""
    packages = changed_packages(task, attempt.packages, only_imported=False)
    return ", ".join(filter(None, (changed_sources(task, attempt.sources), packages)))


def _first(texts: Iterable[str]) -> str:
    """Return the first text that is not empty, else ""."""
    return next(filter(None, texts), "")


def _unfinished(folder: StageFolder, inputs: Mapping[str, str | None]) -> StageStatus:
    last = folder.last_attempt_file()
    if last is None:
        if not folder.has_output():
            return StageStatus("new")
        return StageStatus("restart", reason=f"{folder.output} has no attempt that made it; to be archived")
    current = {name: digest for name, digest in inputs.items() if digest is not None}
    changed = _changed_inputs({name: last.inputs.get(name, "nothing") for name in current}, current)
    if changed and folder.has_output():
        return StageStatus("restart", reason=f"unfinished, and input bytes changed: {changed}")
    return StageStatus(
        "resume", reason=f"unfinished: resumes from attempt {last.attempt}", expected=tuple(last.expected)
    )


def _changed_inputs(old: Mapping[str, str], new: Mapping[str, str | None]) -> str:
    return ", ".join(
        f"{name} {shortened(old.get(name))} -> {shortened(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )
