"""The MLflow client: creating it, locking its database, looking up experiments and runs, its naming limits.

MLflow takes 4 to 6 seconds to import, so it is imported inside functions only.
"""

from __future__ import annotations

import fcntl
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster.passwords import without_passwords
from vico.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_Item = TypeVar("_Item")
_SQLITE = "sqlite:///"


def mlflow_client(uri: str) -> MlflowClient:
    """Return a client for this thread, after one call to see that MLflow answers.

    Calls to a dead server give up soon, because the callers try again themselves.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    with sqlite_lock(uri):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def sqlite_path(uri: str) -> Path | None:
    """Return the path of an sqlite database; None for a server or another database."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


@contextmanager
def sqlite_lock(uri: str) -> Iterator[None]:
    """Lock an sqlite database for steps that fail when two processes take them at the same time.

    These are creating the database and logging a data set.
    """
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, name: str) -> str | None:
    """Return the id of the experiment with this name; None if there is none."""
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment is not None else None


def active_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return the MLflow run with this id; None if somebody deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def tagged_run(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> Run | None:
    """Return the newest MLflow run of an experiment (by id) with these tags; None if there is none."""
    runs = client.search_runs([experiment], tag_filter(tags), max_results=1)
    return runs[0] if runs else None


def running_runs(client: MlflowClient) -> list[Run]:
    """Return vico's runs of all experiments that MLflow shows as running."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token)
        runs += [run for run in page if "vico.run" in run.data.tags]
        token = page.token
        if not token:
            return runs


def tag_filter(tags: Mapping[str, str]) -> str:
    """Return MLflow's search expression for all of these tags."""
    return " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())


def metric_key(name: str) -> str:
    """Return a metric's name in the form that MLflow accepts: a plain path without special characters."""
    key = re.sub(r"[^\w./ :-]", "_", name)[:250]
    is_plain = posixpath.normpath(key) == key and key[:1] not in (".", "/")
    return key if is_plain else key.replace("/", "_").strip(".") or "_"


def chunks(values: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Yield the values in order, at most `size` at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def error_line(error: Exception) -> str:
    """Return type and message as one line, without the password that the URL of a server may hold."""
    return one_line(without_passwords(f"{type(error).__name__}: {error}"))
