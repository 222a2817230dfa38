"""Why a stage would run again: config fields, inputs, source files and packages that differ from those of its
records. Used by planning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.dotted_keys import flattened
from pipeline.config.graph import SOURCES
from pipeline.identity.provenance import package_versions
from pipeline.identity.source_files import imported_packages, source_digests, sources_digest
from pipeline.results.records import (
    CODES_OF_ATTEMPTS,
    PACKAGES_OF_ATTEMPTS,
    PICTURE_ROOTS,
    AttemptFile,
    Record,
)
from pipeline.results.stage_folder import StageFolder, records_of
from stages.parts import has_published

if TYPE_CHECKING:
    from pipeline.planning.tasks import StageTask


_MOST_SHOWN = 3


def code_changes(task: StageTask, record: Record) -> list[str]:
    """Return one line per reason why a reused result may be of other code, packages or pictures than those
    that are here."""
    changed, mixed = changed_since(task, record), mixed_code(record, of_module=task.spec.module_name)
    version = f"fingerprint kept, code_version {task.spec.code_version}"
    lines = [f"{changed} changed since; {version}"] if changed else []
    lines += [f"{mixed}; {version}"] if mixed else []
    return [*lines, *_other_pictures(task, record)]


def _other_pictures(task: StageTask, record: Record) -> list[str]:
    """Return a line if the pictures were read from other folders; their bytes are in no fingerprint."""
    before, now = record.facts.get(PICTURE_ROOTS), list(task.picture_roots)
    if not isinstance(before, list) or before == now:
        return []
    old = ", ".join(str(root) for root in before if root not in now) or "fewer folders"
    new = ", ".join(root for root in now if root not in before) or "fewer folders"
    return [
        f"its pictures were read from {old}, the config names {new}; pictures are in no fingerprint: "
        f"--force {task.name} if these are others"
    ]


def changed_since(task: StageTask, made: Record | AttemptFile) -> str:
    """Return the source files that differ from those of a record or attempt, and the packages of which the
    stage imports something; "" if none does."""
    packages = changed_packages(task, made.packages, only_imported=True)
    return ", ".join(filter(None, (changed_sources(task, made.sources), packages)))


def made_by_attempts(
    folder: StageFolder, sources: Mapping[str, str], packages: Mapping[str, str]
) -> dict[str, Any]:
    """Return what `facts` of a record says of code and packages if not all parts were made with those of the
    last attempt; else an empty dict."""
    attempts = attempts_with_parts(folder)
    facts: dict[str, Any] = {}
    if any(attempt.sources != sources for attempt in attempts):
        facts[CODES_OF_ATTEMPTS] = {str(file.attempt): sources_digest(file.sources) for file in attempts}
    others = {
        str(file.attempt): {name: file.packages.get(name) for name in _differing(file.packages, packages)}
        for file in attempts
        if file.packages
    }
    others = {attempt: versions for attempt, versions in others.items() if versions}
    return {**facts, PACKAGES_OF_ATTEMPTS: others} if others else facts


def attempts_with_parts(folder: StageFolder) -> list[AttemptFile]:
    """Return the files of the attempts that published parts and recorded their code, oldest first."""
    return [
        file
        for file in folder.attempt_files()
        if file.sources and has_published(folder.path / "attempts" / str(file.attempt))
    ]


def mixed_code(record: Record, *, of_module: str | None = None) -> str:
    """Return a sentence if the parts of a result were made by different code or packages, else "".

    With `of_module`, the module of the stage, only packages count of which it imports something.
    """
    codes, packages = record.facts.get(CODES_OF_ATTEMPTS), record.facts.get(PACKAGES_OF_ATTEMPTS, {})
    sentences = [f"made by attempts of different code ({', '.join(codes)})"] if codes else []
    counted = imported_packages(of_module) if of_module is not None and packages else None
    for attempt, versions in packages.items():
        changes = [
            f"{name} {old} -> {record.packages.get(name)}"
            for name, old in versions.items()
            if counted is None or name in counted
        ]
        if changes:
            sentences.append(f"made by attempts of different packages (attempt {attempt}: {_shown(changes)})")
    return "; ".join(sentences)


def changed_sources(task: StageTask, recorded: Mapping[str, str]) -> str:
    """Return up to three source files whose digests differ from the recorded ones; "" if none does."""
    return _shown(_differing(recorded, source_digests(task.spec.module_name)))


def changed_packages(task: StageTask, recorded: Mapping[str, str], *, only_imported: bool) -> str:
    """Return up to three packages whose versions differ from the recorded ones, those that the stage imports
    first; "" if none does or none was recorded."""
    current = package_versions()
    names = _differing(recorded, current) if recorded else []
    imported = imported_packages(task.spec.module_name) if names else frozenset()
    if only_imported:
        names = [name for name in names if name in imported]
    names.sort(key=lambda name: name not in imported)
    return _shown([f"{name} {recorded.get(name)} -> {current.get(name)}" for name in names])


def _differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [name for name in sorted({**before, **after}) if before.get(name) != after.get(name)]


def _shown(texts: Sequence[str]) -> str:
    """Return the first texts, and how many more there are."""
    more = len(texts) - _MOST_SHOWN
    return ", ".join(texts[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


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
    left_out = flattened(dict(task.spec.config_class.LEFT_OUT))
    return flattened(defaults.model_dump(mode="json")) | left_out | flattened(config)


def shortened(digest: str | None) -> str:
    """Return the first 12 characters of a digest; "nothing" for None."""
    return "nothing" if digest is None else digest[:12]
