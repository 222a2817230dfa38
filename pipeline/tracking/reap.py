"""Ends MLflow runs whose driver is gone, and sends what MLflow lacks of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.site import Site
from pipeline.results.runs import ENDED, PIPELINE, RunFile, Runs
from pipeline.tracking.client import active_run, mlflow_client, one_line
from pipeline.tracking.sent import SentState, is_incomplete
from pipeline.tracking.thread import sync

if TYPE_CHECKING:
    from mlflow import MlflowClient


def log_texts(site: Site, run: RunFile, texts: Mapping[str, str]) -> str | None:
    """Put texts by artifact path into the MLflow run of the pipeline; why not, None if they are there or the
    run was never tracked."""
    folder = Runs(site.storage).run_folder(run.run)
    sent = SentState.of(folder, site.tracking_place).runs.get(PIPELINE)
    run_id = sent.id if sent is not None else run.mlflow_run_id
    if run_id is None:
        return None
    try:
        client = mlflow_client(site.tracking_uri)
        for path, text in texts.items():
            client.log_text(run_id, text, path)
    except Exception as error:  # of a server, a database, a store of artifacts
        return f"the report is not in MLflow at {site.tracking_place}: {one_line(error)}"
    return None


def reap(site: Site) -> tuple[list[str], list[str]]:
    """End the MLflow runs that show RUNNING for runs nobody works on any more, and tell MLflow what it lacks
    of runs that have ended: (what was done, what could not be). A driver may have been killed before it could
    tell, the server been away, and the command that made a run may be at work on a newer one.
    """
    database = Path(site.tracking_uri.removeprefix("sqlite:///"))
    if site.tracking_uri.startswith("sqlite:///") and not database.is_file():
        return [], []
    try:
        client = mlflow_client(site.tracking_uri)
        stale = _running(client)
    except Exception as error:
        return [], [f"MLflow at {site.tracking_place}: {one_line(error)}"]
    runs, done, left = Runs(site.storage), [], []
    states = {run.run: run.state for run in runs.all()}
    for name in dict.fromkeys(run.data.tags["vico.run"] for run in stale):
        own = [run for run in stale if run.data.tags["vico.run"] == name]
        if name in states and states[name] in ENDED:
            problem = sync(site, runs.run_folder(name))
            _end(client, own)
            (left if problem else done).append(problem or f"closed in MLflow: run {name}: {states[name]}")
        elif name not in states and any(_is_of_storage(run, site) for run in own):
            _end(client, own)
            done.append(f"closed in MLflow: run {name}: its folder is gone")
    for name in (name for name, state in states.items() if state in ENDED):
        if is_incomplete(runs.run_folder(name), site):
            problem = sync(site, runs.run_folder(name))
            (left if problem else done).append(problem or f"sent to MLflow: what it lacked of run {name}")
    return done, left


def _running(client: MlflowClient) -> list[Any]:
    """Our runs of all experiments that MLflow shows as running."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    found, token = [], None
    while True:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token)
        found += [run for run in page if "vico.run" in run.data.tags]
        token = page.token
        if not token:
            return found


def _is_of_storage(run: Any, site: Site) -> bool:
    """Whether the MLflow run of a pipeline says that it lies here; those of other storages are let alone."""
    return run.data.tags.get("vico.storage") == site.storage_address


def _end(client: MlflowClient, stale: list[Any]) -> None:
    """End those that still run: our files no longer know of them."""
    for run in stale:
        now = active_run(client, run.info.run_id)
        if now is not None and now.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
