"""The MLflow client and its limits: how it is made, looked up, locked and given text."""

from __future__ import annotations

import fcntl
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.passwords import without_passwords

if TYPE_CHECKING:
    from mlflow import MlflowClient


def metric_key(name: str) -> str:
    """The name as MLflow takes it: it refuses some characters, and names that are no plain path."""
    key = re.sub(r"[^\w./ :-]", "_", name)[:250]
    plain = posixpath.normpath(key) == key and key[:1] not in (".", "/")
    return key if plain else key.replace("/", "_").strip(".") or "_"


def mlflow_client(uri: str) -> MlflowClient:
    """A client for this thread. Its caller tries again by itself, so calls to a dead server give up soon."""
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


def chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def one_line(error: Exception) -> str:
    """The error without a password that the URL of a server may hold."""
    return f"{type(error).__name__}: {without_passwords(' '.join(str(error).split()))[:200]}"


def active_run(client: MlflowClient, run_id: str) -> Any:
    """The MLflow run; None when somebody deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


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
