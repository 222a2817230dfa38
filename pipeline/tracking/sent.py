"""What was sent to MLflow: per run in `runs/<run>/mlflow.json`, per metric the steps. Imports nothing
heavy."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from cluster.site import Site
from cluster.sqlite_uris import sqlite_path
from pipeline.json_files import StoredModel
from pipeline.storage.lookup import storage_of
from vico.errors import UserError

logger = logging.getLogger(__name__)
STATE_FILE = "mlflow.json"
_REMEDY = "it will be rebuilt from MLflow"


class SentRun(BaseModel):
    """What was sent to one MLflow run."""

    model_config = ConfigDict(strict=True)

    id: str
    began: str
    status: str = "RUNNING"
    params: list[str] = []
    tags: dict[str, str] = {}
    steps: dict[str, int] = {}
    """Metric -> the last step that MLflow has."""
    datasets: list[str] = []
    models: dict[str, str] = {}
    """Name and digest of a model -> its id."""
    versions: dict[str, str] = {}
    """Name and digest of a model -> its version in the model registry."""
    candidate: str = ""
    """The version that got the alias of the candidate."""
    files: dict[str, list[int]] = {}
    """Path of an artifact -> size and modification time of the file when it was sent."""


class StepSet:
    """A set of steps with one bit per step: a run may have a million steps of sixty metrics. The bits are
    kept in pages, because a metric may have few steps that are far apart."""

    _PAGE_STEPS = 4096

    def __init__(self, steps: Iterable[int] = ()):
        self._pages: dict[int, bytearray] = {}
        for step in steps:
            self.add(step)

    def __contains__(self, step: int) -> bool:
        page, byte, bit = self._position(step)
        return page in self._pages and bool(self._pages[page][byte] & bit)

    def add(self, step: int) -> None:
        page, byte, bit = self._position(step)
        if page not in self._pages:
            self._pages[page] = bytearray(self._PAGE_STEPS // 8)
        self._pages[page][byte] |= bit

    def _position(self, step: int) -> tuple[int, int, int]:
        page, bit = divmod(step, self._PAGE_STEPS)
        return page, bit // 8, 1 << bit % 8


class SentSteps:
    """The steps of each metric that MLflow has: those it had when it was asked, and those sent since.

    The last step of a metric is not enough: after a restart of the ranks, steps are done again, and a metric
    that is reported rarely (`seconds_checkpoint`) may come at a step before its last one. `last` (metric ->
    step) is saved for people to read.
    """

    def __init__(self, last: dict[str, int], steps: dict[str, StepSet]):
        self.last, self._steps = last, steps

    def is_new(self, key: str, step: int) -> bool:
        return step not in self._steps.get(key, ())

    def add(self, key: str, step: int) -> None:
        self._steps.setdefault(key, StepSet()).add(step)
        self.last[key] = max(step, self.last.get(key, step))


class SentState(StoredModel):
    """The content of mlflow.json. If the file is lost, it is rebuilt from what MLflow has."""

    uri: str
    moves_with_storage: bool = False
    """The database is the default one in the storage folder. If that was moved, it has another URI and is the
    same MLflow."""
    runs: dict[str, SentRun] = Field(default_factory=dict)
    superseded: list[str] = Field(default_factory=list)
    """MLflow runs of stages that have since been started from scratch."""
    complete: bool = False
    """The run has ended and all of it was sent to MLflow."""

    @classmethod
    def of(cls, run_folder: Path, site: Site) -> Self:
        """Return the saved state; an empty one if there is none, or one that is damaged or of another MLflow.

        If the storage was moved or copied, the files of the run are to be sent again: MLflow's artifacts may
        not have come along.
        """
        address, is_default = site.tracking_address, site.tracking.uri is None
        try:
            state = cls.read(run_folder / STATE_FILE, _REMEDY)
        except UserError as error:
            logger.warning("%s", error)
            state = None
        if state is None or not state.is_of(site):
            return cls(uri=address, moves_with_storage=is_default)
        if state.uri != address:
            for sent in state.runs.values():
                sent.files = {}
            state.uri, state.complete = address, False
        state.moves_with_storage = is_default
        return state

    def is_of(self, site: Site) -> bool:
        """Return whether this was sent to the MLflow of the site."""
        return self.uri == site.tracking_address or (self.moves_with_storage and site.tracking.uri is None)


def is_complete(run_folder: Path, site: Site) -> bool:
    """Return whether all of this run was sent to MLflow, by mlflow.json alone."""
    return SentState.of(run_folder, site).complete


def is_incomplete(run_folder: Path, site: Site) -> bool:
    """Return whether mlflow.json says that this MLflow lacks a part of the run, or is damaged.

    False for a run that was never to be in this MLflow.
    """
    try:
        state = SentState.read(run_folder / STATE_FILE, _REMEDY)
    except UserError:
        return True
    return state is not None and state.is_of(site) and not state.complete


def database_is_missing(site: Site) -> bool:
    """Return whether MLflow is an sqlite database whose file does not exist."""
    database = sqlite_path(site.tracking_uri)
    return database is not None and not database.is_file()


def mark_incomplete(run_folder: Path, site: Site) -> None:
    """Make the next `vico run` or `vico audit --reap` send MLflow what it lacks of a run that has ended."""
    if not is_incomplete(run_folder, site):
        state = SentState.of(run_folder, site)
        state.complete = False
        storage_of(run_folder).write(run_folder / STATE_FILE, state.content())
