"""Why a stage would run again, or what changed since it ran: fields, inputs and source files, held against
records of the stage. Used by planning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.graph import SOURCES
from pipeline.identity.source_files import source_digests, sources_digest
from pipeline.results.stage_folder import AttemptFile, Record, StageFolder, records_of
from stages.parts import has_published

if TYPE_CHECKING:
    from pipeline.planning.tasks import StageTask


CODES_OF_ATTEMPTS = "sources_of_attempts"
"""Among the facts of a record: attempt -> digest of its source files, where these are not all the same."""


def code_changes(task: StageTask, record: Record) -> list[str]:
    """Source files that differ from those a result was made with, though its fingerprint still holds."""
    changed = changed_sources(task, record.sources)
    version = f"fingerprint kept, code_version {task.spec.code_version}"
    found = [f"{changed} changed since; {version}"] if changed else []
    mixed = mixed_code(record)
    return [*found, f"{mixed}; {version}"] if mixed else found


def codes_of_attempts(folder: StageFolder, sources: Mapping[str, str]) -> dict[str, Any]:
    """What a record notes where the parts of a result, the last ones made with `sources`, are not all of one
    code."""
    attempts = sources_of_parts(folder)
    if all(file.sources == sources for file in attempts):
        return {}
    return {CODES_OF_ATTEMPTS: {str(one.attempt): sources_digest(one.sources) for one in attempts}}


def sources_of_parts(folder: StageFolder) -> list[AttemptFile]:
    """Files of the attempts that published parts and noted their code, oldest first."""
    return [
        file
        for file in folder.attempt_files()
        if file.sources and has_published(folder.path / "attempts" / str(file.attempt))
    ]


def mixed_code(record: Record) -> str:
    """Whether the parts of a result are of several codes, in words; empty if not."""
    codes = record.facts.get(CODES_OF_ATTEMPTS)
    return f"made by attempts of different code ({', '.join(codes)})" if codes else ""


def changed_sources(task: StageTask, made_with: Mapping[str, str]) -> str:
    """Up to three of the source files that are not those a result was made with; empty if all are."""
    now = source_digests(task.spec.module_name)
    names = [name for name in {**made_with, **now} if made_with.get(name) != now.get(name)]
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def changes(task: StageTask, storage: Path) -> list[str]:
    """What differs from the latest record of the stage, down to the field."""
    records = records_of(storage, task.name)
    if not records:
        return ["no earlier result"]
    old = records[-1].identity
    found = []
    if old["code_version"] != task.spec.code_version:
        found.append(f"{task.name} code_version: {old['code_version']} -> {task.spec.code_version}")
    before = _with_defaults(task, old["config"])
    after = _with_defaults(task, task.identity["config"])
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path):
            found.append(f"{task.name}.{path}: {before.get(path)!r} -> {after.get(path)!r}")
    for name in sorted({*old["inputs"], *task.inputs}):
        was, now = old["inputs"].get(name), task.inputs.get(name)
        if was != now:
            kind = "digest" if name in SOURCES else "fingerprint"
            found.append(f"{name} {kind}: {shortened(was)} -> {shortened(now)}")
    return found or [f"no record under {task.fingerprint[:12]}"]


def _with_defaults(task: StageTask, config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted path -> value, with the defaults that a recorded config leaves out."""
    required = {name for name, info in task.spec.config_class.model_fields.items() if info.is_required()}
    flat: dict[str, Any] = {}
    if not required:
        _flatten(task.spec.config_class().model_dump(mode="json"), "", flat)
    _flatten(config, "", flat)
    return flat


def _flatten(block: Mapping[str, Any], prefix: str, into: dict[str, Any]) -> None:
    for name, value in block.items():
        if isinstance(value, Mapping) and value:
            _flatten(value, f"{prefix}{name}.", into)
        else:
            into[prefix + name] = value


def shortened(value: str | None) -> str:
    return "nothing" if value is None else value[:12]
