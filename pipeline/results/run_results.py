"""The records that a run made or reused, even if a later run moved them to superseded/.

Used by audit, diff, reproduce, export and gc.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.results.records import RECORD_FILE, Record
from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.lookup import storage_of
from vico.errors import UserError


@dataclass(frozen=True)
class RunRecord:
    """A stage's record with the folder it is in: the stage's own folder, or one of its superseded/<n>."""

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
        """The folder with the metrics; it stays in the stage's folder if only the record was superseded."""
        own = self.folder / "attempts"
        return self.folder.parent.parent / "attempts" if self.is_superseded and not own.exists() else own


def record_of(run: RunFile, stage: str, storage: Path) -> RunRecord | None:
    """Return the record of a stage as this run made or reused it, or None if it does not exist.

    Raises UserError if the stage's current record is damaged.
    """
    entry = run.stages[stage]
    folder = StageFolder(storage, stage, entry.fingerprint)
    origin = (entry.reused_from or run.run, entry.attempt)
    current = folder.record()
    if current is not None and (current.run, current.attempt) == origin:
        return RunRecord(current, folder.path)
    for path in sorted(folder.path.glob(f"superseded/*/{RECORD_FILE}")):
        try:
            superseded = Record.read(path, "a later run replaced it")
        except UserError:
            continue  # perhaps of another run; the audit reports that this run's record is missing
        if superseded is not None and (superseded.run, superseded.attempt) == origin:
            return RunRecord(superseded, path.parent, is_superseded=True)
    return None


def readable_records(run: RunFile, storage: Path) -> dict[str, RunRecord]:
    """Return the undamaged records of the run by stage, after reading their folders with the metrics from the
    storage."""
    records = {}
    for stage, entry in run.stages.items():
        storage_of(storage).refresh(storage / stage / entry.fingerprint)
        try:
            record = record_of(run, stage, storage)
        except UserError:
            continue  # the commands that use this explain what is left; `vico audit` names the damage
        if record is not None:
            records[stage] = record
    return records
