"""What MLflow has been told of a run: `runs/<run>/mlflow.json`. Used by tracking; light."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from cluster.site import Site
from pipeline.json_files import StoredModel
from pipeline.storage.lookup import storage_of
from vico.errors import UserError

logger = logging.getLogger(__name__)
STATE_FILE = "mlflow.json"


class SentRun(BaseModel):
    """What one MLflow run has been told."""

    model_config = ConfigDict(strict=True)

    id: str
    began: str
    status: str = "RUNNING"
    params: list[str] = []
    tags: dict[str, str] = {}
    steps: dict[str, int] = {}
    """The last step that MLflow has of each metric."""
    datasets: list[str] = []
    models: dict[str, str] = {}
    """Name and digest of a model -> its id."""
    versions: dict[str, str] = {}
    """Name and digest of a model -> its version in the model registry."""
    files: dict[str, list[int]] = {}
    """Path of an artifact -> size and time of change of the file when it was sent."""


class StepSet:
    """A set of steps, a bit each: a run has up to a million of them, of some sixty metrics. The bits lie in
    pages, since a metric may have few steps far apart."""

    _PAGE_STEPS = 4096

    def __init__(self, steps: Iterable[int] = ()):
        self._pages: dict[int, bytearray] = {}
        for step in steps:
            self.add(step)

    def __contains__(self, step: int) -> bool:
        number, byte, bit = self._place(step)
        return number in self._pages and bool(self._pages[number][byte] & bit)

    def add(self, step: int) -> None:
        number, byte, bit = self._place(step)
        if number not in self._pages:
            self._pages[number] = bytearray(self._PAGE_STEPS // 8)
        self._pages[number][byte] |= bit

    def _place(self, step: int) -> tuple[int, int, int]:
        number, place = divmod(step, self._PAGE_STEPS)
        return number, place // 8, 1 << place % 8


class SentSteps:
    """Which steps of each metric MLflow has: what it said when it was asked, and what was sent since.

    The last one of a metric would not do: after a restart of ranks steps are done again, and what comes only
    now and then (`seconds_checkpoint`) may come at a step before its last. `last` is saved for people to see.
    """

    def __init__(self, last: dict[str, int], known: dict[str, StepSet]):
        self.last, self._known = last, known

    def is_new(self, key: str, step: int) -> bool:
        return step not in self._known.get(key, ())

    def add(self, key: str, step: int) -> None:
        self._known.setdefault(key, StepSet()).add(step)
        self.last[key] = max(step, self.last.get(key, step))


class SentState(StoredModel):
    """mlflow.json. Made again from what MLflow has when it is lost."""

    uri: str
    runs: dict[str, SentRun] = Field(default_factory=dict)
    superseded: list[str] = Field(default_factory=list)
    """MLflow runs of stages that were begun afresh since."""
    complete: bool = False
    """The run has ended and MLflow was told everything of it."""

    @classmethod
    def of(cls, run_folder: Path, uri: str) -> Self:
        """The state as saved; an empty one when there is none, or one of another MLflow."""
        try:
            state = cls.read(run_folder / STATE_FILE, "it is made again from MLflow")
        except UserError as error:
            logger.warning("%s", error)
            state = None
        return state if state is not None and state.uri == uri else cls(uri=uri)


def is_complete(run_folder: Path, site: Site) -> bool:
    """Whether MLflow was told everything of this run; does not ask it."""
    return SentState.of(run_folder, site.tracking_place).complete


def is_incomplete(run_folder: Path, site: Site) -> bool:
    """Whether it is noted that this MLflow lacks something of the run; not so of one that it never had."""
    try:
        state = SentState.read(run_folder / STATE_FILE, "it is made again from MLflow")
    except UserError:
        return True
    return state is not None and state.uri == site.tracking_place and not state.complete


def mark_incomplete(run_folder: Path, site: Site) -> None:
    """Have the next `vico run` ask MLflow what it lacks of a run that has ended, and tell it."""
    if not is_incomplete(run_folder, site):
        state = SentState.of(run_folder, site.tracking_place)
        state.complete = False
        storage_of(run_folder).write(run_folder / STATE_FILE, state.content())
