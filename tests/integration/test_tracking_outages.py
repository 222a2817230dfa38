"""An MLflow that takes nothing during a whole run: the same command, or `vico audit --reap`, sends it."""

import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
import pytest

from tests.integration.tiny_pipeline.project import ROOT, TRACKED, TinyProject

IMPATIENT = "name: tiny\ntracking: {interval_s: 0.1, finish_timeout_s: 3}\n"
LACKS = "lacks the latest data of run"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path, empty_database) -> Iterator[TinyProject]:
    project = TinyProject(tmp_path / "project")
    project.storage.mkdir()
    shutil.copy(empty_database, project.storage / "mlflow.db")
    (project.folder / "site.yaml").write_text(TRACKED)
    yield project
    project.close()


def shown_statuses(database: Path, run: str) -> dict[str, str]:
    """Return stage -> status of what MLflow shows of a run."""
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("vico")
    shown = client.search_runs([experiment.experiment_id], f"tags.`vico.run` = '{run}'") if experiment else []
    return {run.data.tags["vico.stage"]: run.info.status for run in shown}


ALL_FINISHED = dict.fromkeys(("pipeline", "draw", "square", "total"), "FINISHED")


def problems(project: TinyProject, run: str = "latest", code: int = 0) -> list[str]:
    answer = json.loads(project.vico("audit", run, "--json", code=code))
    return [problem["kind"] for problem in answer["problems"]]


@contextmanager
def locked(database: Path) -> Iterator[None]:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.rollback()


def test_a_database_that_is_locked_during_a_whole_run_gets_it_from_the_same_command(project):
    (project.folder / "site.yaml").write_text(IMPATIENT)
    with locked(project.storage / "mlflow.db"):
        assert LACKS in project.vico("run")
        assert "SQL" not in project.last_output + project.errors
        (run,) = project.runs()
        assert problems(project, code=1) == ["mlflow_incomplete"]
    assert shown_statuses(project.storage / "mlflow.db", run) == {}
    (project.folder / "site.yaml").write_text(TRACKED)
    assert f"run {run}: MLflow now has all of it" in project.vico("run")
    assert shown_statuses(project.storage / "mlflow.db", run) == ALL_FINISHED
    assert problems(project) == []
    details = project.status(run)
    assert details["mlflow_run_id"] and all(stage["mlflow_run_id"] for stage in details["stages"])
    assert "MLflow" not in project.vico("run")


@pytest.mark.slow
def test_reap_sends_runs_that_never_reached_mlflow(project):
    """Neither the database nor its folder exists, and the pipeline of the first run has a newer run."""
    blocked = project.folder / "blocked"
    blocked.write_text("a file where a folder should be")
    tracking = f"tracking: {{interval_s: 0.1, uri: 'sqlite:///{blocked}/mlflow.db'}}\n"
    (project.folder / "site.yaml").write_text(f"name: tiny\n{tracking}")
    assert LACKS in project.vico("run")
    assert LACKS in project.vico("run", "--force", "total")
    assert LACKS in project.vico("run", "--set", "square.power=3", TINY_FAIL="total:0", code=1)
    failed, second, first = project.runs()
    project.vico("audit", "--reap", code=1)
    assert "MLflow at sqlite:///" in project.errors
    blocked.unlink()
    project.vico("audit", "--reap")
    sent = [f"sent to MLflow: what it lacked of run {run}" for run in (failed, second, first)]
    assert project.errors.splitlines() == sent
    for run in (first, second):
        assert shown_statuses(blocked / "mlflow.db", run) == ALL_FINISHED
        assert problems(project, run) == []
    half = ALL_FINISHED | {"pipeline": "FAILED", "total": "FAILED"}
    assert shown_statuses(blocked / "mlflow.db", failed) == half
    project.vico("audit", "--reap")
    assert project.errors == ""


@pytest.mark.slow
def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(project):
    project.vico("run")
    (first,) = project.runs()
    database = project.storage / "mlflow.db"
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    client.delete_experiment(client.get_experiment_by_name("vico").experiment_id)
    output = project.vico("run", "--set", "seed=8")
    second = project.runs()[0]
    assert LACKS in output and "mlflow experiments restore" in output
    assert "experiments restore" in (project.storage / "runs" / second / "driver.log").read_text()
    assert problems(project, first, code=1) == ["mlflow_missing"]
    assert "mlflow experiments restore" in project.last_output
    project.vico("audit", "--reap", code=1)
    assert "mlflow experiments restore" in project.errors

    variable, program, *arguments = shlex.split(output.split("`")[1])
    assert program == "mlflow"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict([variable.split("=", 1)])}
    subprocess.run([sys.executable, "-m", "mlflow", *arguments], env=environment, check=True)
    assert "MLflow now has all of it" in project.vico("run", "--set", "seed=8")
    project.vico("audit", "--reap")
    for run in (first, second):
        assert shown_statuses(database, run) == ALL_FINISHED
        assert problems(project, run) == []


@pytest.mark.slow
def test_a_database_that_was_removed_is_filled_again(project):
    project.vico("run")
    (run,) = project.runs()
    database = project.storage / "mlflow.db"
    database.unlink()
    assert f"run {run}: MLflow now has all of it" in project.vico("run")
    assert shown_statuses(database, run) == ALL_FINISHED
    database.unlink()
    project.vico("audit", "--reap")
    assert project.errors == f"sent to MLflow: what it lacked of run {run}\n"
    assert problems(project, run) == []


def test_a_kill_after_the_last_stage_leaves_no_run_that_shows_running(project):
    """The command that resumes it has no stage to run."""
    project.vico("run", code=-9, VICO_DIE="recorded:total")
    assert "MLflow now has all of it" in project.vico("run")
    (run,) = project.runs()
    assert shown_statuses(project.storage / "mlflow.db", run) == ALL_FINISHED
