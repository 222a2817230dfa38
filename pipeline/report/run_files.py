"""The files of a run that its report reads, and the reason if one cannot be shown."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.identity.file_digests import file_sha256s
from pipeline.results.records import Record
from pipeline.results.run_results import RunRecord, record_of
from pipeline.results.runs import ENDED, RunFile
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.lookup import storage_of
from vico.bounded_text import bounded_json
from vico.errors import UserError, one_line

logger = logging.getLogger(__name__)
_MAX_JSON_BYTES = 2**27
Content = TypeVar("Content")


class Missing(Exception):
    """A part of the report cannot be shown. The message is a sentence for the page."""


@dataclass(frozen=True)
class Part(Generic[Content]):
    """A part of the report: its content, or the sentence that says why there is none."""

    content: Content | None
    missing: str = ""


def part(make: Callable[[], Content]) -> Part[Content]:
    """Return what `make` returns, or why it cannot: its `Missing`, or a file of another form."""
    try:
        return Part(make())
    except Missing as missing:
        return Part(None, str(missing))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        logger.info("a part of the report is left out", exc_info=True)
        fault = one_line(f"{type(error).__name__}: {error}")
        return Part(None, f"The files have another form than this version of vico writes ({fault}).")


@dataclass(frozen=True)
class RunFiles:
    """A run, the records of its stages, and the files that these name."""

    run: RunFile
    storage: Path
    records: Mapping[str, RunRecord]
    """Of the stages that are done and whose record can be read."""
    faults: Mapping[str, str]
    """Stage -> why its record cannot be read."""

    @classmethod
    def of(cls, run: RunFile, storage: Path) -> "RunFiles":
        """Read the records of a run, and the metrics beside them, from a folder or an object store."""
        records, faults = {}, {}
        for stage, entry in run.stages.items():
            storage_of(storage).refresh(storage / stage / entry.fingerprint)
            try:
                record = record_of(run, stage, storage)
            except UserError as error:
                faults[stage] = str(error)
                continue
            if record is not None:
                records[stage] = record
        return cls(run, storage, records, faults)

    def record(self, stage: str) -> Record:
        """Return the record of a stage; raise Missing if there is none."""
        if stage not in self.records:
            raise Missing(self.why_missing(stage))
        return self.records[stage].record

    def path(self, stage: str, name: str) -> Path:
        """Return the path of a file of a stage's output, whose bytes are those of the record.

        Raises Missing.
        """
        outputs = self.record(stage).outputs
        if name not in outputs:
            raise Missing(f"The output of stage {stage} has no {name}.")
        folder, file = self.records[stage].folder, f"{name} of stage {stage}"
        check = f"`vico audit {self.run.run}` checks all files"
        try:
            wrong = storage_of(self.storage).fetch(folder, {name: outputs[name]}, file_sha256s)
        except (OSError, UserError) as error:
            raise Missing(f"{file} cannot be read ({one_line(error)}); {check}.") from error
        if wrong is not None:
            raise Missing(f"{file} is gone or differs from its record; {check}.")
        return folder / "output" / name

    def json(self, stage: str, name: str) -> Any:
        """Return the content of a JSON file of a stage's output; raise Missing."""
        try:
            return bounded_json(self.path(stage, name).read_text(encoding="utf-8"), _MAX_JSON_BYTES)
        except json.JSONDecodeError as error:
            raise Missing(f"{name} of stage {stage} is not valid JSON ({error}).") from error

    def attempts(self, stage: str) -> Path | None:
        """Return the folder with the attempts at a stage; None before the first one."""
        if stage in self.records:
            return self.records[stage].attempts
        entry = self.run.stages[stage]
        folder = StageFolder(self.storage, stage, entry.fingerprint).path / "attempts"
        return folder if entry.attempt else None

    def why_missing(self, stage: str) -> str:
        """Return a sentence that says why a stage has no result in this run."""
        run = self.run
        if stage in self.faults:
            return f"Stage {stage} cannot be shown: {self.faults[stage]}."
        if stage not in run.stages:
            return f"Stage {stage} is not part of this run, which ends with stage {list(run.stages)[-1]}."
        state, error = (
            run.stages[stage].state,
            f": {one_line(run.error, max_chars=None)}" if run.error else "",
        )
        if state == "done":
            return f"The result of stage {stage} was removed; the same `vico run` makes it again."
        if state == "running":
            return f"Stage {stage} is still running."
        if state != "pending":
            return f"Stage {stage} is {state}{error}."
        if run.state in ENDED:
            return f"Stage {stage} was not reached: the run is {run.state}{error}."
        return f"Stage {stage} has not begun."
