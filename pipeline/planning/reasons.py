"""Why a stage would run again: config fields, inputs and source files that differ from those of its records.
Used by planning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.dotted_keys import flattened
from pipeline.config.graph import SOURCES
from pipeline.identity.source_files import source_digests, sources_digest
from pipeline.results.records import AttemptFile, Record
from pipeline.results.stage_folder import StageFolder, records_of
from stages.parts import has_published

if TYPE_CHECKING:
    from pipeline.planning.tasks import StageTask


CODES_OF_ATTEMPTS = "sources_of_attempts"
"""Key in `facts` of a record: attempt -> digest of its source files, if the attempts had different ones."""


def code_changes(task: StageTask, record: Record) -> list[str]:
    """Return one line per reason why a reused result may be of other code than the code that is here."""
    changed, mixed = changed_sources(task, record.sources), mixed_code(record)
    version = f"fingerprint kept, code_version {task.spec.code_version}"
    lines = [f"{changed} changed since; {version}"] if changed else []
    return [*lines, f"{mixed}; {version}"] if mixed else lines


def codes_of_attempts(folder: StageFolder, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return what `facts` of a record says of the code if not all parts were made with `sources`, the code of
    the last attempt; else an empty dict."""
    attempts = attempts_with_parts(folder)
    if all(attempt.sources == sources for attempt in attempts):
        return {}
    return {CODES_OF_ATTEMPTS: {str(file.attempt): sources_digest(file.sources) for file in attempts}}


def attempts_with_parts(folder: StageFolder) -> list[AttemptFile]:
    """Return the files of the attempts that published parts and recorded their code, oldest first."""
    return [
        file
        for file in folder.attempt_files()
        if file.sources and has_published(folder.path / "attempts" / str(file.attempt))
    ]


def mixed_code(record: Record) -> str:
    """Return a sentence if the parts of a result were made by different code, else ""."""
    codes = record.facts.get(CODES_OF_ATTEMPTS)
    return f"made by attempts of different code ({', '.join(codes)})" if codes else ""


def changed_sources(task: StageTask, recorded: Mapping[str, str]) -> str:
    """Return up to three source files whose digests differ from the recorded ones; "" if none does."""
    current = source_digests(task.spec.module_name)
    names = [name for name in {**recorded, **current} if recorded.get(name) != current.get(name)]
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def changes(task: StageTask, storage: Path) -> list[str]:
    """Return one line per difference between the stage and its latest record, down to the config field."""
    records = records_of(storage, task.name)
    if not records:
        return ["no earlier result"]
    old = records[-1].identity
    lines = []
    if old["code_version"] != task.spec.code_version:
        lines.append(f"{task.name} code_version: {old['code_version']} -> {task.spec.code_version}")
    before = _with_defaults(task, old["config"])
    after = _with_defaults(task, task.identity["config"])
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path):
            lines.append(f"{task.name}.{path}: {before.get(path)!r} -> {after.get(path)!r}")
    for name in sorted({*old["inputs"], *task.inputs}):
        was, now = old["inputs"].get(name), task.inputs.get(name)
        if was != now:
            kind = "digest" if name in SOURCES else "fingerprint"
            lines.append(f"{name} {kind}: {shortened(was)} -> {shortened(now)}")
    return lines or [f"no record under {task.fingerprint[:12]}"]


def _with_defaults(task: StageTask, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted path -> value, with the defaults that a recorded config leaves out."""
    defaults = task.spec.config_class.model_construct()  # without the fields that have none
    return flattened(defaults.model_dump(mode="json")) | flattened(config)


def shortened(digest: str | None) -> str:
    """Return the first 12 characters of a digest; "nothing" for None."""
    return "nothing" if digest is None else digest[:12]
