"""What MLflow has been told of a run: `runs/<run>/mlflow.json`. Used by tracking; light."""

import logging
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

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
    files: dict[str, list[int]] = {}
    """Path of an artifact -> size and time of change of the file when it was sent."""
    settled: bool = False
    """It has ended and was told everything."""


class SentState(StoredModel):
    """mlflow.json. Made again from what MLflow has when it is lost."""

    uri: str
    runs: dict[str, SentRun] = {}
    superseded: list[str] = []
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
    return SentState.of(run_folder, site.tracking_uri).complete
