"""The MLflow client: creating it, locking its database, looking up experiments and runs, its naming limits.

MLflow takes 4 to 6 seconds to import, so it is imported inside functions only.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from cluster.passwords import without_passwords
from cluster.site import Site
from cluster.sqlite_uris import sqlite_path
from stages.durable_files import locked_file
from vico.errors import UserError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
    from mlflow.store.entities import PagedList

_Item = TypeVar("_Item")


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
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # our callers print the error
    if "%" in uri and uri.startswith("sqlite:///"):
        # For this scheme MLflow creates the folder above the database, and does not decode its name.
        uri = uri.replace("sqlite:///", "sqlite+pysqlite:///", 1)
    with sqlite_lock(uri):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def sqlite_lock(uri: str) -> Iterator[None]:
    """Lock an sqlite database for steps that fail when two processes take them at the same time.

    These are creating the database or an experiment, correcting it and logging a data set. Raises UserError
    if another process does not release the lock.
    """
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(path.with_name(f"{path.name}.lock")):
        yield


def active_experiment(client: MlflowClient, name: str, site: Site) -> Experiment | None:
    """Return the experiment with this name; None if there is none.

    Raises UserError if somebody deleted it: MLflow keeps it, takes nothing for it and does not give its name
    to another.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage == "active":
        return experiment
    variable = f"MLFLOW_TRACKING_URI={shlex.quote(site.tracking_address)}"
    raise UserError(
        f"experiment {name} was deleted in MLflow; restore it with "
        f"`{variable} mlflow experiments restore --experiment-id {experiment.experiment_id}`"
    )


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
    experiments = [experiment.experiment_id for experiment in all_pages(client.search_experiments)]
    is_running = "attributes.status = 'RUNNING'"
    shown = all_pages(lambda page_token: client.search_runs(experiments, is_running, page_token=page_token))
    return [run for run in shown if "vico.run" in run.data.tags]


def all_pages(search: Callable[..., PagedList[_Item]]) -> Iterator[_Item]:
    """Yield what a search of MLflow finds, of all its pages."""
    token: str | None = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


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
    """Return type and message as one line, without the password that the URL of a server may hold.

    The SQL that a database could not do is left out. The line of a UserError is whole: it ends with a remedy.
    """
    if isinstance(error, UserError):
        return without_passwords(str(error))
    message = str(error).partition("\n[SQL:")[0]
    return one_line(without_passwords(f"{type(error).__name__}: {message}"))
