"""What a run made or reused, found again: a later run may have set a stage's record aside. Used by audit,
diff, reproduce, export and gc."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import RECORD_FILE, Record, StageFolder
from pipeline.storage.lookup import storage_of
from vico.errors import UserError


@dataclass(frozen=True)
class RunRecord:
    """A stage's record with the folder it lies in: the stage's own, or one of its superseded ones."""

    record: Record
    folder: Path
    is_superseded: bool = False

    @property
    def path(self) -> Path:
        return self.folder / RECORD_FILE

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def attempts(self) -> Path:
        """Where the metrics lie; they stay with the stage when only its record was set aside."""
        own = self.folder / "attempts"
        return self.folder.parent.parent / "attempts" if self.is_superseded and not own.exists() else own


def record_of(run: RunFile, stage: str, storage: Path) -> RunRecord | None:
    """The record of a stage as this run made or reused it; None when there is none, UserError when the one
    that stands is damaged."""
    entry = run.stages[stage]
    folder = StageFolder(storage, stage, entry.fingerprint)
    mark = (entry.reused_from or run.run, entry.attempt)
    current = folder.record()
    if current is not None and (current.run, current.attempt) == mark:
        return RunRecord(current, folder.path)
    for path in sorted(folder.path.glob(f"superseded/*/{RECORD_FILE}")):
        try:
            old = Record.read(path, "it was set aside")
        except UserError:
            continue  # of some run; the audit's reader is told that this one's is not there
        if old is not None and (old.run, old.attempt) == mark:
            return RunRecord(old, path.parent, is_superseded=True)
    return None


def readable_records(run: RunFile, storage: Path) -> dict[str, RunRecord]:
    """The records of all stages of the run that are there and whole; their metrics can be read, too."""
    found = {}
    for stage, entry in run.stages.items():
        storage_of(storage).refresh(storage / stage / entry.fingerprint)
        try:
            record = record_of(run, stage, storage)
        except UserError:
            continue  # commands that explain what is left go on without it; `vico audit` names it
        if record is not None:
            found[stage] = record
    return found
