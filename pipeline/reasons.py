"""Why a stage would run again, or what changed since it ran: fields, inputs and source files, held against
records of the stage. Used by planning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graph import SOURCES
from pipeline.sources import source_digests
from pipeline.store import Record, records_of

if TYPE_CHECKING:
    from pipeline.planning import StageTask


def code_changes(task: StageTask, record: Record) -> list[str]:
    """Source files that differ from those a result was made with, though its fingerprint still holds."""
    changed = changed_sources(task, record)
    if not changed:
        return []
    return [f"{changed} changed since; fingerprint kept, code_version {task.spec.code_version}"]


def changed_sources(task: StageTask, record: Record) -> str:
    """Up to three of the source files that are not those a result was made with; empty if all are."""
    now = source_digests(task.spec.module_name)
    names = [name for name in {**record.sources, **now} if record.sources.get(name) != now.get(name)]
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
