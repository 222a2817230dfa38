"""One stage of a run in the store: its record and every byte of its output. Called by the audit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.audit.findings import Findings
from pipeline.audit.stage_code import audit_code
from pipeline.audit.stage_files import audit_links, read_files
from pipeline.audit.stage_metrics import audit_metrics
from pipeline.identity.source_files import sources_digest
from pipeline.json_files import OutputFile
from pipeline.results.records import AttemptFile, Record, record_digest
from pipeline.results.run_results import record_of
from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import StageFolder
from vico.errors import UserError


def audit_stage(run: RunFile, stage: str, storage: Path, findings: Findings) -> Record | None:
    """Check the stage's folder; return its record if it can be read and is the one of this run."""
    folder = StageFolder(storage, stage, run.stages[stage].fingerprint)
    audit_links(folder, findings)
    audit_metrics(folder, findings)
    outputs = read_files(folder, findings)
    record = _readable_record(run, folder, findings)
    if record is None:
        return None
    findings.checked["stages"] += 1
    audit = _RecordAudit(run, folder, record, findings)
    audit.audit_record()
    audit.audit_outputs(outputs)
    audit_code(folder, record, findings)
    return record if audit.is_of_run() else None


def _readable_record(run: RunFile, folder: StageFolder, findings: Findings) -> Record | None:
    stage = folder.stage
    try:
        record = folder.record()
    except UserError as error:
        findings.problem(stage, "record", folder.record_path, str(error))
        return None
    if record is None and folder.record_path.exists():
        message = "is not the one that was committed: it was edited"
        findings.problem(stage, "record", folder.record_path, message)
    elif record is None and run.stages[stage].state == "done":
        message = "the run says that the stage is done, but its record is missing"
        findings.problem(stage, "record_missing", folder.record_path, message)
    return record


@dataclass(frozen=True)
class _RecordAudit:
    run: RunFile
    folder: StageFolder
    record: Record
    findings: Findings

    def audit_record(self) -> None:
        """Compare the record with its own digests and with the file of the attempt that made it."""
        path, record = self.folder.record_path, self.record
        content = json.loads(path.read_text(encoding="utf-8"))
        self.findings.facts.records[record.stage] = content
        if record.record_digest is None:
            self._note("the record has no digest of itself (written by an older vico)")
        elif record_digest(content) != record.record_digest:
            self._problem("record", path, "was edited: record_digest does not match its content")
        if sources_digest(record.sources) != record.source_digest:
            self._problem("record", path, "was edited: source_digest does not match its sources")
        attempt_path = self.folder.path / "attempts" / str(record.attempt) / "attempt.json"
        try:
            attempt = AttemptFile.read(attempt_path, "what the attempt recorded is lost")
        except UserError as error:
            self._problem("attempt", attempt_path, str(error))
            return
        if attempt is None:
            message = f"attempt {record.attempt}, which made the record, is missing"
            self._problem("attempt", attempt_path, message)
        elif (attempt.inputs, attempt.run) != (record.inputs, record.run):
            self._problem("attempt", attempt_path, "names other inputs or another run than the record")

    def audit_outputs(self, outputs: Mapping[str, OutputFile]) -> None:
        """Compare the files that were read (`outputs`, by name) with those that are recorded."""
        for name, recorded in self.record.outputs.items():
            file = outputs.get(name)
            if file is None:
                self._output_problem("output_missing", name, "is recorded but missing")
                continue
            if file.bytes != recorded.bytes:
                message = f"has {file.bytes} bytes, {recorded.bytes} are recorded"
                self._output_problem("output_size", name, message)
                continue
            self.findings.checked["files"] += 1
            self.findings.checked["bytes"] += file.bytes
            if file.sha256 != recorded.sha256:
                message = f"sha256 {file.sha256[:12]} is not the recorded {recorded.sha256[:12]}"
                self._output_problem("output_content", name, message)
        for name in sorted(set(outputs) - set(self.record.outputs)):
            self._output_problem("output_unrecorded", name, "exists but is not recorded")

    def is_of_run(self) -> bool:
        """Return whether this run made or reused the record; report it if another run replaced the record."""
        entry, stage = self.run.stages[self.folder.stage], self.folder.stage
        own = record_of(self.run, stage, self.folder.path.parent.parent)
        if own is not None and not own.is_superseded:
            return True
        if own is not None and own.record.output_digest == self.record.output_digest:
            self._note(f"made again by run {self.record.run}, with the same bytes")
            return True
        if own is not None:
            message = (
                f"run {self.record.run} made it again with other bytes; this run's result is archived here"
            )
            self._problem("superseded", own.path, message)
        elif entry.state == "done":
            message = (
                f"is of run {self.record.run}, attempt {self.record.attempt}; run.json says "
                f"{entry.reused_from or self.run.run}, attempt {entry.attempt}"
            )
            self._problem("record", self.folder.record_path, message)
        # Not done: a kill came between record and run.json; the same command completes run.json.
        return False

    def _problem(self, kind: str, path: Path | str, message: str) -> None:
        self.findings.problem(self.folder.stage, kind, path, message)

    def _output_problem(self, kind: str, name: str, message: str) -> None:
        self._problem(kind, self.folder.storage.address(self.folder.output / name), message)

    def _note(self, text: str) -> None:
        self.findings.note(self.folder.stage, text)
