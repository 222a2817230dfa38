"""From the last stage back to the source rows: every record's inputs are the outputs that stand there, and
the inputs from outside are still the bytes that were read. Called by the audit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.audit.findings import Findings
from pipeline.config.graph import SOURCES
from pipeline.config.pipeline_file import Inputs
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.input_digests import source_fingerprint
from pipeline.results.runs import PIPELINE, RUN_FILE, RunFile, Runs
from pipeline.results.stage_folder import Record, StageFolder
from vico.errors import UserError


class Unremembered(DigestCache):
    """Reads every file anew: an audit trusts no time stamp."""

    def _load(self) -> dict[str, list]:
        return {}


def audit_lineage(run: RunFile, records: Mapping[str, Record], storage: Path, found: Findings) -> None:
    run_path = Runs(storage).run_folder(run.run) / RUN_FILE
    sources: dict[str, dict[str, list[str]]] = {}
    for stage, record in records.items():
        path = StageFolder(storage, stage, record.fingerprint).record_path
        adopted_from = (run.config.get("inputs") or {}).get("adopt", {}).get(stage)
        if adopted_from is not None:
            text = f"adopted from {adopted_from}, digest {str(record.identity['config'].get('digest'))[:12]}"
            found.note(stage, f"{text}; its own lineage is not known here")
            continue
        _audit_config(stage, record, run, run_path, found)
        for name in sorted({*record.inputs, *record.identity.get("inputs", {})}):
            found.checked["inputs"] += 1
            value, identity = record.inputs.get(name), record.identity["inputs"].get(name)
            if name in SOURCES:
                if value != identity:
                    found.problem(stage, "input", path, f"{name}: inputs and identity give two digests")
                sources.setdefault(name, {}).setdefault(str(value), []).append(stage)
            elif name not in run.stages:
                found.problem(stage, "lineage", path, f"its input {name} is no stage of run {run.run}")
            else:
                _audit_link(stage, name, record, run, records, path, found)
    inputs = _inputs(run, run_path, found) if sources else None
    for name, readers in sources.items():
        _audit_source(name, readers, inputs, run_path, found)


def _audit_link(
    stage: str,
    name: str,
    record: Record,
    run: RunFile,
    records: Mapping[str, Record],
    path: Path,
    found: Findings,
) -> None:
    """One stage's input against the stage that gives it."""
    fingerprint, made = record.identity["inputs"].get(name), records.get(name)
    if fingerprint != run.stages[name].fingerprint:
        message = (
            f"was made from {name} {str(fingerprint)[:12]}, the run has {run.stages[name].fingerprint[:12]}"
        )
        found.problem(stage, "lineage", path, message)
    if made is None:
        found.note(stage, f"what it was made from cannot be held against {name}, whose record is not there")
    elif made.output_digest != record.inputs.get(name):
        message = (
            f"was made from {name} output {str(record.inputs.get(name))[:12]}, "
            f"the record there says {made.output_digest[:12]}"
        )
        found.problem(stage, "input", path, message)


def _audit_source(
    name: str, readers: Mapping[str, list[str]], inputs: Inputs | None, path: Path, found: Findings
) -> None:
    """An input from outside, read again, against what each of its readers recorded."""
    if inputs is None:
        return
    place = inputs.model if name in ("model", "tokenizer") else getattr(getattr(inputs, name), "path", None)
    try:
        now = source_fingerprint(name, inputs, Unremembered(path.parent))
    except (UserError, OSError) as error:
        for stage in next(iter(readers.values())):
            found.problem(stage, "input_missing", place or path, f"{name}: {error}")
        return
    for value, stages in readers.items():
        for stage in stages if value != now else []:
            message = f"{name}: sha256 {value[:12]} was read, {str(now)[:12]} is there now"
            found.problem(stage, "input_changed", place or path, message)


def _inputs(run: RunFile, path: Path, found: Findings) -> Inputs | None:
    try:
        return Inputs.model_validate_json(json.dumps(run.config.get("inputs")))
    except ValidationError as error:
        found.problem(PIPELINE, "run", path, f"config.inputs cannot be read: {error.errors()[0]['msg']}")
        return None


def _audit_config(stage: str, record: Record, run: RunFile, path: Path, found: Findings) -> None:
    """Config in the record's identity, which leaves defaults out, against the run's."""
    for name in differences(record.identity.get("config"), run.config.get(stage), stage):
        found.problem(stage, "config", path, f"{name} differs from the config in the record's identity")


def differences(recorded: Any, given: Any, name: str) -> list[str]:
    """Dotted names under which `given` lacks what is recorded or says something else."""
    if isinstance(recorded, Mapping) and isinstance(given, Mapping):
        return [
            one for key in recorded for one in differences(recorded[key], given.get(key), f"{name}.{key}")
        ]
    return [] if recorded == given else [name]
