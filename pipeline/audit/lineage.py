"""Lineage, from the last stage back to the source rows. Called by the audit.

The inputs of every record must be the outputs of the stages before, and the inputs from outside must still
have the bytes that were read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.audit.findings import Findings
from pipeline.config.graph import MODEL_SOURCES, SOURCES, block_of
from pipeline.config.inputs import Inputs
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.input_digests import source_fingerprint
from pipeline.results.records import Record
from pipeline.results.runs import PIPELINE, RUN_FILE, RunFile, Runs
from pipeline.results.stage_folder import StageFolder
from vico.errors import UserError

Readers = dict[str, list[str]]
"""Recorded digest of an input -> the stages that recorded it."""


class UncachedDigests(DigestCache):
    """Reads every file in full: an audit does not trust modification times."""

    @staticmethod
    def _load(path: Path) -> dict[str, list[Any]]:
        return {}


def audit_lineage(run: RunFile, records: Mapping[str, Record], storage: Path, findings: Findings) -> None:
    """Check the lineage of the finished stages, `records`."""
    _LineageAudit(run, records, storage, findings).audit()


@dataclass(frozen=True)
class _LineageAudit:
    run: RunFile
    records: Mapping[str, Record]
    storage: Path
    findings: Findings

    def audit(self) -> None:
        sources: dict[str, Readers] = {}
        for stage, record in self.records.items():
            adopted_from = (self.run.config.get("inputs") or {}).get("adopt", {}).get(stage)
            if adopted_from is not None:
                digest = str(record.identity["config"].get("digest"))[:12]
                text = f"adopted from {adopted_from}, digest {digest}; its own lineage is not known here"
                self.findings.note(stage, text)
                continue
            self._audit_config(stage, record)
            for name in sorted({*record.inputs, *record.identity.get("inputs", {})}):
                self.findings.checked["inputs"] += 1
                if name in SOURCES:
                    self._audit_digests(stage, name, record)
                    readers = sources.setdefault(name, {})
                    readers.setdefault(str(record.inputs.get(name)), []).append(stage)
                else:
                    self._audit_link(stage, name, record)
        inputs = self._inputs() if sources else None
        if inputs is not None:
            for name, readers in sources.items():
                self._audit_source(name, readers, inputs)

    @property
    def _run_path(self) -> Path:
        return Runs(self.storage).run_folder(self.run.run) / RUN_FILE

    def _record_path(self, record: Record) -> Path:
        return StageFolder(self.storage, record.stage, record.fingerprint).record_path

    def _audit_config(self, stage: str, record: Record) -> None:
        """Compare the config in the record's identity, which leaves out defaults, with that of the run."""
        for name in differences(record.identity.get("config"), block_of(self.run.config, stage), stage):
            message = f"{name} differs from the config in the record's identity"
            self.findings.problem(stage, "config", self._run_path, message)

    def _audit_digests(self, stage: str, name: str, record: Record) -> None:
        if record.inputs.get(name) != record.identity["inputs"].get(name):
            message = f"{name}: the digests in inputs and identity differ"
            self.findings.problem(stage, "input", self._record_path(record), message)

    def _audit_link(self, stage: str, name: str, record: Record) -> None:
        """Compare the input `name` of a stage with the stage that it comes from."""
        path = self._record_path(record)
        if name not in self.run.stages:
            message = f"its input {name} is not a stage of run {self.run.run}"
            self.findings.problem(stage, "lineage", path, message)
            return
        recorded, current = record.identity["inputs"].get(name), self.run.stages[name].fingerprint
        if recorded != current:
            message = f"was made from {name} {str(recorded)[:12]}, the run has {current[:12]}"
            self.findings.problem(stage, "lineage", path, message)
        source = self.records.get(name)
        if source is None:
            text = f"its input cannot be compared with {name}, which has no valid record"
            self.findings.note(stage, text)
        elif source.output_digest != record.inputs.get(name):
            message = (
                f"was made from {name} output {str(record.inputs.get(name))[:12]}, "
                f"the record there says {source.output_digest[:12]}"
            )
            self.findings.problem(stage, "input", path, message)

    def _inputs(self) -> Inputs | None:
        try:
            return Inputs.model_validate_json(json.dumps(self.run.config.get("inputs")))
        except ValidationError as error:
            message = f"config.inputs cannot be read: {error.errors()[0]['msg']}"
            self.findings.problem(PIPELINE, "run", self._run_path, message)
            return None

    def _audit_source(self, name: str, readers: Readers, inputs: Inputs) -> None:
        """Read an input from outside again, and compare it with what its readers recorded."""
        path = inputs.model if name in MODEL_SOURCES else getattr(getattr(inputs, name), "path", None)
        path = path or self._run_path
        try:
            now = source_fingerprint(name, inputs, UncachedDigests(self._run_path.parent))
        except (UserError, OSError) as error:
            for stage in next(iter(readers.values())):
                self.findings.problem(stage, "input_missing", path, f"{name}: {error}")
            return
        self.findings.facts.inputs[name] = str(now)
        for digest, stages in readers.items():
            for stage in stages if digest != now else []:
                message = f"{name}: sha256 {digest[:12]} was read, {str(now)[:12]} is there now"
                self.findings.problem(stage, "input_changed", path, message)


def differences(recorded: Any, current: Any, name: str) -> list[str]:
    """Return the dotted names under which `current` lacks or contradicts what is recorded."""
    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        return [
            inner
            for key in recorded
            for inner in differences(recorded[key], current.get(key), f"{name}.{key}")
        ]
    return [] if recorded == current else [name]
