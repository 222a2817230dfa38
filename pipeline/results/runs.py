"""Runs: each is one requested pipeline with the state of every stage, in `<storage>/runs/<run>/run.json`."""

import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.identity.fingerprints import digest
from pipeline.json_files import StoredModel
from pipeline.results.records import Record
from pipeline.storage.lease import Lease
from pipeline.storage.lease_file import read_lease
from pipeline.storage.lookup import storage_of
from vico.errors import UserError
from vico.own_files import check_inside

State = Literal["pending", "running", "done", "failed", "interrupted", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "interrupted", "cancelled")
RUN_FILE = "run.json"
_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
PIPELINE = "pipeline"
"""The name of the run as a whole, next to the names of its stages."""
_REMEDY = "delete that run's folder; results of stages are in other folders and stay"


class StageEntry(BaseModel):
    """One stage of a run.

    `reused` means that the last command on the run found the stage done; `reused_from` is the run that made
    it.
    """

    model_config = ConfigDict(strict=True)

    fingerprint: str
    state: State = "pending"
    attempt: int = 0
    seconds: float | None = None
    reused: bool = False
    reused_from: str | None = None
    forced: bool = False
    """--force moved an earlier result of the stage to superseded/ in this run."""
    mlflow_run_id: str | None = None

    def mark_reused(self, record: Record) -> None:
        """Enter what the record of the stage says; the run that made it may be this one."""
        self.state, self.attempt, self.seconds = "done", record.attempt, record.seconds
        self.reused, self.reused_from = True, record.run
        self.mlflow_run_id = record.mlflow_run_id or self.mlflow_run_id


class RunAttempt(BaseModel):
    """One command that worked on the run."""

    model_config = ConfigDict(strict=True)

    started: str
    host: str
    pid: int
    user: str = ""
    """Login name; empty from an older vico."""
    ended: str | None = None
    state: State = "running"


class RunFile(StoredModel):
    """run.json; only the holder of the run's lease writes it."""

    run: str
    created: str
    pipeline: str
    experiment: str
    config: dict[str, Any]
    site: str
    site_file: str | None = None
    """Absolute path of the site file of the last command; None if there was none, and from an older vico."""
    state: State = "pending"
    error: str | None = None
    stages: dict[str, StageEntry] = Field(min_length=1)
    mlflow_run_id: str | None = None
    submission: dict[str, Any] | None = None
    accepted: bool = False
    """--accept was given: the model may become the candidate without passing the quality gate."""
    attempts: list[RunAttempt] = Field(default_factory=list)


class Runs:
    """All runs of a storage folder."""

    def __init__(self, storage: Path):
        self.folder = storage / "runs"
        self.storage = storage_of(storage)

    @property
    def address(self) -> str:
        return self.storage.address(self.folder.parent)

    def run_folder(self, run: str) -> Path:
        return self.folder / run

    def all(self) -> list[RunFile]:
        """Return every run, newest first; one whose driver was killed is `interrupted`."""
        runs = [self._read(path.parent) for path in self.folder.glob(f"*/{RUN_FILE}")]
        return sorted(runs, key=lambda run: (run.created, run.run), reverse=True)

    def named(self, name: str) -> RunFile:
        """Return the run with this id or unique beginning of an id, or the `latest`; else raise UserError."""
        if not name.strip():  # `vico cancel "$RUN"` without RUN would stop the only run
            raise UserError("RUN is empty; give an id, a unique beginning of one, or `latest`")
        ids = sorted(path.parent.name for path in self.folder.glob(f"*/{RUN_FILE}"))
        if not ids:
            raise UserError(f"RUN={name!r}: there are no runs in {self.address}; check --storage or --site")
        if name == "latest":
            return self.all()[0]
        matches = [name] if name in ids else [run for run in ids if run.startswith(name)]
        if not matches:
            raise UserError(f"RUN={name!r} is not a run in {self.address}; `vico status` lists them")
        if len(matches) > 1:
            raise UserError(f"RUN={name!r} fits {', '.join(matches)}; give more characters")
        return self._read(self.run_folder(matches[0]))

    def latest_of(self, pipeline: str) -> RunFile | None:
        """Return the newest run of the pipeline with this digest that was not cancelled, or None."""
        same = (run for run in self.all() if run.pipeline == pipeline and run.state != "cancelled")
        return next(same, None)

    def create(
        self,
        *,
        pipeline: str,
        fingerprints: Mapping[str, str],
        experiment: str,
        config: dict[str, Any],
        site: str,
        submission: dict[str, Any] | None = None,
    ) -> RunFile:
        """Write a new pending run and return it."""
        now = datetime.now(UTC)
        run = RunFile(
            run=self._new_folder(now),
            created=now.isoformat(timespec="microseconds"),
            pipeline=pipeline,
            experiment=experiment,
            config=config,
            site=site,
            submission=submission,
            stages={name: StageEntry(fingerprint=value) for name, value in fingerprints.items()},
        )
        self.save(run)
        return run

    def save(self, run: RunFile, lease: Lease | None = None) -> None:
        """Write run.json; with a lease, raise LeaseLost instead if another driver has taken over the run."""
        path = self.run_folder(run.run) / RUN_FILE
        check_inside(path.parent, self.folder.parent)
        if lease is None:
            self.storage.write(path, run.content())
            return
        with lease.writing():
            self.storage.write(path, run.content())

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock under which a command looks for its run or creates it."""
        check_inside(self.folder, self.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.storage.locked_runs(self.folder)

    def _new_folder(self, now: datetime) -> str:
        while True:
            letters = "".join(secrets.choice(_LETTERS) for _ in range(4))
            run = f"{now:%Y%m%d-%H%M%S}-{letters}"
            try:
                self.run_folder(run).mkdir(parents=True)
                return run
            except FileExistsError:
                continue

    def _read(self, folder: Path) -> RunFile:
        run = _run_file(folder)
        if run.state == "running" and not _has_driver(folder):
            run = _run_file(folder)  # its driver may have ended it between the two reads
            if run.state == "running":
                _interrupt(run)
        return run


def pipeline_digest(fingerprints: Mapping[str, str]) -> str:
    """Return the identity of a whole pipeline: a digest of its stages, in order, with their fingerprints."""
    return digest([[name, value] for name, value in fingerprints.items()])


def _run_file(folder: Path) -> RunFile:
    run = RunFile.read(folder / RUN_FILE, _REMEDY)
    if run is None:
        raise UserError(f"{folder / RUN_FILE} is gone; {_REMEDY}")
    if run.run != folder.name:  # else `vico gc --drop COPY` would remove the run that was copied
        raise UserError(f"{folder / RUN_FILE} is damaged (it is of run {run.run!r}); {_REMEDY}")
    return run


def _has_driver(folder: Path) -> bool:
    """Return False if it is certain that nobody works on the run any more."""
    holder = read_lease(folder)
    return holder is not None and not holder.released and not holder.is_dead()


def _interrupt(run: RunFile) -> None:
    """Mark what a killed driver left running as interrupted."""
    run.state = "interrupted"
    for entry in run.stages.values():
        if entry.state == "running":
            entry.state = "interrupted"
    for attempt in run.attempts:
        if attempt.state == "running":
            attempt.state = "interrupted"
