"""Seals: the digests and values of a run in one file, kept elsewhere, by which any later change is found.

An audit compares a run with its own records. Somebody who rewrites output, record and MLflow alike is not
found by it, since nothing is signed. A seal is compared with the run instead of its records.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.audit.facts import Facts
from pipeline.audit.findings import Findings
from pipeline.config.dotted_keys import flattened
from pipeline.results.runs import PIPELINE, RunFile
from stages.durable_files import sync_folder
from vico.bounded_text import bounded_json
from vico.errors import UserError
from vico.own_files import is_inside, no_links

SEAL_SCHEMA = 1
_KIND = "seal of a vico run"
_MAX_BYTES = 2**30
_KINDS = {"records": "seal_record", "run": "seal_run", "inputs": "seal_input", "mlflow": "seal_mlflow"}
"""Part of the facts -> kind of the problem if a value in it differs."""


@dataclass(frozen=True)
class Seal:
    """The content of a seal file. `facts` are those of `Facts` as JSON, `trees` has one digest per stage over
    all of its files. `digest` is over everything else; note it where the file cannot be replaced."""

    run: str
    sealed: str
    facts: dict[str, Any]
    trees: dict[str, str]
    digest: str


def check_place(path: Path, site: Site, option: str) -> None:
    """Raise UserError if a seal would be, or is, in the storage that it is to be compared with."""
    if is_inside(path.absolute(), site.storage):
        raise UserError(
            f"{option} {path} is in the storage {site.storage}, where whoever changes the run can change the "
            "seal; keep it on another disk or machine"
        )


def check_unwritten(path: Path) -> None:
    """Raise UserError if there is something with the name of a seal to write, or no folder for it."""
    if os.path.lexists(path):
        raise UserError(f"--seal {path} exists; give a new file, or --against to compare with it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--seal {path}: the folder {path.absolute().parent} does not exist; create it")


def write_seal(path: Path, run: RunFile, facts: Facts, moment: str) -> Seal:
    """Write a new seal of a run and return it."""
    content = _facts_json(facts)
    body: dict[str, Any] = {"kind": _KIND, "schema": SEAL_SCHEMA, "run": run.run, "sealed": moment}
    body |= {"facts": content, "trees": _trees(content["files"])}
    seal = Seal(run.run, moment, content, body["trees"], sha256_of(body))
    try:
        with open(path, "xb", opener=no_links) as file:
            file.write(_canonical({**body, "digest": seal.digest}))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"--seal {path} cannot be written ({error.strerror}); give another file") from error
    sync_folder(path.absolute().parent)
    return seal


def read_seal(path: Path, run: RunFile) -> Seal:
    """Return a seal. Raises UserError if it is not a seal of this run, of another version, or damaged."""
    option = f"--against {path}"
    try:
        with open(path, "rb", opener=no_links) as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{option} cannot be read ({error.strerror}); give the file of a seal") from error
    try:
        content = bounded_json(data.decode("utf-8"), _MAX_BYTES)
    except ValueError as error:
        raise UserError(f"{option} is damaged ({error}); give a copy of the seal") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise UserError(f"{option} is not a seal; `vico audit RUN --seal FILE` writes one")
    if content.get("schema") != SEAL_SCHEMA:
        raise UserError(
            f"{option} has schema {content.get('schema')!r}, this vico reads {SEAL_SCHEMA}; use the version "
            "that wrote it"
        )
    body = {name: value for name, value in content.items() if name != "digest"}
    if sha256_of(body) != content.get("digest") or _canonical(content) != data:
        raise UserError(
            f"{option} is damaged or was edited (its digest does not fit its content); give a copy of it"
        )
    if content["run"] != run.run:
        raise UserError(f"{option} is of run {content['run']}, not of {run.run}; give the seal of this run")
    return Seal(content["run"], content["sealed"], content["facts"], content["trees"], content["digest"])


def compare_with_seal(seal: Seal, facts: Facts, findings: Findings) -> None:
    """Report every file that was added, removed or changed, and every value that differs from the seal."""
    now = _facts_json(facts)
    for name in sorted({*seal.trees, *_trees(now["files"])}):
        if seal.trees.get(name) != _trees(now["files"]).get(name):
            _compare_files(name, seal.facts["files"], now["files"], findings)
    for part, kind in _KINDS.items():
        for stage, name, was, value in _differing(part, seal.facts[part], now[part]):
            message = f"sealed was {_shown(was)}, now it is {_shown(value)}"
            findings.problem(stage, kind, name, message)


def _compare_files(stage: str, sealed: Mapping[str, Any], now: Mapping[str, Any], findings: Findings) -> None:
    for name in sorted({*sealed, *now}):
        was, file = sealed.get(name), now.get(name)
        if was == file or name.partition("/")[0] != stage:
            continue
        if was is None:
            findings.problem(stage, "seal_added", name, "was added after the run was sealed")
        elif file is None:
            findings.problem(stage, "seal_removed", name, "was removed after the run was sealed")
        else:
            message = (
                f"was changed: sealed was sha256 {was['sha256'][:12]} ({was['bytes']} bytes), now it is "
            )
            findings.problem(
                stage, "seal_changed", name, f"{message}{file['sha256'][:12]} ({file['bytes']} bytes)"
            )


def _differing(
    part: str, sealed: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield (stage, dotted name, sealed value, value now) of every value that differs; None is missing."""
    was, value = flattened(sealed), flattened(now)
    for name in sorted({*was, *value}):
        if was.get(name) != value.get(name):
            stage = name.partition(".")[0] if part in ("records", "mlflow") else PIPELINE
            yield stage, f"{part}.{name}", was.get(name), value.get(name)


def _shown(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _facts_json(facts: Facts) -> dict[str, Any]:
    content = asdict(facts)
    content["files"] = {name: file.model_dump() for name, file in facts.files.items()}
    return json.loads(json.dumps(content))


def _trees(files: Mapping[str, Any]) -> dict[str, str]:
    """Return stage -> digest over the names, sizes and sha256 of all of its files."""
    stages: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        stages.setdefault(name.partition("/")[0], {})[name] = file
    return {stage: sha256_of(inside) for stage, inside in stages.items()}


def sha256_of(value: Any) -> str:
    """Return the sha256 of a JSON value in its canonical form."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Any) -> bytes:
    """Return JSON with sorted keys, no white space, and characters outside of ASCII as escapes."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")
