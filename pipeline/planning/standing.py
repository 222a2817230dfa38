"""Where a stage's result stands: reusable, unfinished, changed or not begun, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.planning.reasons import changed_sources, mixed_code, shortened, sources_of_parts
from pipeline.planning.tasks import StageTask
from pipeline.results.stage_folder import NO_DAMAGE, Damage, Record, StageFolder


@dataclass(frozen=True)
class Standing:
    """How a stage stands in the store.

    reuse: done. new: nothing is there. resume: parts are there. rebuild: done once, but outputs are missing
    or damaged. afresh: what is there was made from other bytes or nobody knows from what, and is set aside.
    unknown: done once, but what it was made from is made again first.
    """

    way: Literal["reuse", "new", "resume", "rebuild", "afresh", "unknown"]
    record: Record | None = None
    reason: str = ""
    damage: Damage = NO_DAMAGE
    expected: tuple[str, ...] = ()


def standing(folder: StageFolder, inputs: Mapping[str, str | None]) -> Standing:
    """How the stage stands, given digests of its inputs as they are now (None: not known before they are
    made).

    Raises UserError when a file of the store is damaged so that only the user can decide.
    """
    record = folder.record()
    if record is None:
        return _unfinished(folder, inputs)
    folder.refuse_edited(record)
    if None in inputs.values():
        made_first = ", ".join(name for name, value in inputs.items() if value is None)
        return Standing(
            "unknown", record, f"runs after {made_first}, unless the bytes from there stay the same"
        )
    changed = _changed_inputs(record.inputs, inputs)
    if changed:
        return Standing("afresh", record, f"input bytes changed: {changed}")
    damage = folder.damage(record)
    if damage:
        names = (*damage.missing, *damage.resized)
        return Standing("rebuild", record, f"{damage}; made again", damage, names)
    return Standing("reuse", record, f"done in run {record.run}")


def task_standing(
    task: StageTask, storage: Path, inputs: Mapping[str, str | None], *, strict_code: bool
) -> Standing:
    """How a stage of a pipeline stands; with `strict_code`, other source files are a reason to start afresh
    even though its fingerprint holds. Without it a stage goes on from parts of other code, which is said."""
    folder = task.folder(storage)
    found = standing(folder, inputs)
    if found.way == "resume":
        changed = _changed_since_attempts(task, folder)
        said = f"{found.reason}; {changed} changed since, and its parts stay"
        found = replace(found, reason=said) if changed else found
    else:
        changed = changed_sources(task, found.record.sources) if found.way == "reuse" else ""
    mixed = mixed_code(found.record) if found.way == "reuse" else ""
    if strict_code and (changed or mixed):
        why = f"{changed} changed since" if changed else mixed
        return Standing("afresh", found.record, f"{why} (--strict-code)")
    return found


def _changed_since_attempts(task: StageTask, folder: StageFolder) -> str:
    """The source files that are not those of an earlier attempt whose parts would be gone on with."""
    noted = (changed_sources(task, file.sources) for file in sources_of_parts(folder))
    return next(filter(None, noted), "")


def _unfinished(folder: StageFolder, inputs: Mapping[str, str | None]) -> Standing:
    last = folder.last_attempt_file()
    if last is None:
        if not folder.has_output():
            return Standing("new")
        return Standing("afresh", reason=f"{folder.output} has no attempt that made it; set aside")
    known = {name: value for name, value in inputs.items() if value is not None}
    changed = _changed_inputs({name: last.inputs.get(name, "nothing") for name in known}, known)
    if changed and folder.has_output():
        return Standing("afresh", reason=f"unfinished, and input bytes changed: {changed}")
    return Standing(
        "resume", reason=f"unfinished: goes on from attempt {last.attempt}", expected=tuple(last.expected)
    )


def _changed_inputs(old: Mapping[str, str], new: Mapping[str, str | None]) -> str:
    return ", ".join(
        f"{name} {shortened(old.get(name))} -> {shortened(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )
