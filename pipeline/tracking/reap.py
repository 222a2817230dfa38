"""Ends the MLflow runs of dead drivers, and sends MLflow what it lacks of ended runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.site import Site
from pipeline.results.runs import ENDED, RUN_FILE, Runs
from pipeline.storage.storage_id import storage_id
from pipeline.tracking.artifact_roots import correct_moved_roots
from pipeline.tracking.client import active_run, error_line, mlflow_client, running_runs
from pipeline.tracking.sent import SentState, database_is_missing, is_incomplete
from pipeline.tracking.thread import sync_once

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def reap(site: Site) -> tuple[list[str], list[str]]:
    """End MLflow runs that show RUNNING without a driver, and send MLflow what it lacks of ended runs.

    Returns a line for each thing that was done, and one for each that failed. A run is left like that if its
    driver was killed, if the server was down, or if the command that started it is working on a newer run.
    Addresses of a store that was moved are corrected first.
    """
    runs = Runs(site.storage)
    states = {run.run: run.state for run in runs.all()}
    is_lost = database_is_missing(site)
    if is_lost and not any(_lacks_something(runs.run_folder(name), site, is_lost) for name in states):
        return [], []  # nothing was ever to be there
    done: list[str] = []
    failed: list[str] = []
    try:
        client = mlflow_client(site.tracking_uri)
        done += correct_moved_roots(site)
        shown_as_running = running_runs(client)
        for name in dict.fromkeys(run.data.tags["vico.run"] for run in shown_as_running):
            own = [run for run in shown_as_running if run.data.tags["vico.run"] == name]
            if name in states and states[name] in ENDED:
                problem = sync_once(site, runs.run_folder(name))
                _end(client, own)
                line = f"closed in MLflow: run {name}: {states[name]}"
                (failed if problem else done).append(problem or line)
            elif _is_gone(runs, name) and any(_is_of_storage(run, site) for run in own):
                _end(client, own)
                done.append(f"closed in MLflow: run {name}: its folder is gone")
    except Exception as error:  # from a server or a database
        return done, [*failed, f"MLflow at {site.tracking_address}: {error_line(error)}"]
    for name in states:
        folder = runs.run_folder(name)
        if states[name] in ENDED and _lacks_something(folder, site, is_lost):
            problem = sync_once(site, folder)
            (failed if problem else done).append(problem or f"sent to MLflow: what it lacked of run {name}")
    return done, failed


def _lacks_something(run_folder: Path, site: Site, is_lost: bool) -> bool:
    """Return whether MLflow lacks a part of a run, or all of it because its database `is_lost`."""
    return is_incomplete(run_folder, site) or (is_lost and bool(SentState.of(run_folder, site).runs))


def _is_gone(runs: Runs, name: str) -> bool:
    """Return whether the storage has no such run now; one may have begun since the runs were listed."""
    folder = runs.run_folder(Path(name).name)
    runs.storage.refresh(folder)
    return not (folder / RUN_FILE).exists()


def _is_of_storage(run: Run, site: Site) -> bool:
    """Return whether the MLflow run names this storage; runs of other storages are left alone.

    Its path does not say so: storages of two machines may have the same one.
    """
    own = storage_id(site.storage)
    return bool(own) and run.data.tags.get("vico.storage_id") == own


def _end(client: MlflowClient, runs: list[Run]) -> None:
    """End the runs that still show RUNNING: our files have no entry for them any more."""
    for run in runs:
        now = active_run(client, run.info.run_id)
        if now is not None and now.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
