"""What MLflow has been told of a run: `runs/<run>/mlflow.json`. Used by tracking; light."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from cluster.site import Site
from pipeline.json_files import StoredModel
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
    """The last step that was sent of each metric."""
    datasets: list[str] = []
    models: dict[str, str] = {}
    """Name and digest of a model -> its id."""
    versions: dict[str, str] = {}
    """Name and digest of a model -> its version in the model registry."""
    files: dict[str, list[int]] = {}
    """Path of an artifact -> size and time of change of the file when it was sent."""


class SentSteps:
    """Which steps of each metric MLflow has.

    All of them are known after it was asked, until `settle`: the steps of a metric come in order, so the
    last one is enough from then on. That is `last`, the mark that is saved.
    """

    def __init__(self, last: dict[str, int], known: dict[str, set[int]]):
        self.last, self._known = last, known
        last.update({key: max(steps) for key, steps in known.items() if steps})

    def is_new(self, key: str, step: int) -> bool:
        if key in self._known:
            return step not in self._known[key]
        return step > self.last.get(key, step - 1)

    def add(self, key: str, step: int) -> None:
        if key in self._known:
            self._known[key].add(step)
        self.last[key] = max(step, self.last.get(key, step))

    def settle(self) -> None:
        self._known.clear()


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


@contextmanager
def sqlite_lock(uri: str) -> Iterator[None]:
    """Keep others out of an sqlite database where two at once fail: when it or a data set in it is made."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
