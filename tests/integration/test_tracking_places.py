"""MLflow's database and artifacts stay in the store: with any name of its folder, moved, and copied."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from tests.integration.test_tracking_outages import ALL_FINISHED, IMPATIENT, problems
from tests.integration.tiny_pipeline.project import TRACKED, TinyProject


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def new_project(folder: Path, database: Path, site: str = TRACKED) -> TinyProject:
    project = TinyProject(folder)
    project.storage.mkdir()
    shutil.copy(database, project.storage / "mlflow.db")
    (project.folder / "site.yaml").write_text(site)
    return project


@pytest.fixture
def project(tmp_path, empty_database) -> Iterator[TinyProject]:
    project = new_project(tmp_path / "first", empty_database)
    yield project
    project.close()


def rows(storage: Path, query: str) -> list[str]:
    """Return the first column, read from the database without a URI."""
    with closing(sqlite3.connect(storage / "mlflow.db")) as connection:
        return sorted(row[0] for row in connection.execute(query))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "artifacts",
    [
        pytest.param("", id="default"),
        pytest.param(", artifacts: 'FOLDER/kept%20here?'", id="stated", marks=pytest.mark.slow),
    ],
)
def test_stores_whose_names_differ_by_quoting_do_not_share_a_database(tmp_path, empty_database, artifacts):
    names = ["a b", "a%20b", "a?b", "a#b"]
    projects = []
    for name in names:
        site = TRACKED.replace("}", artifacts.replace("FOLDER", str(tmp_path / name)) + "}")
        projects.append(new_project(tmp_path / name, empty_database, site))
    for project in projects:
        project.vico("run")
        assert problems(project) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for project in projects:
        assert rows(project.storage, "select status from runs") == ["FINISHED"] * 4
        root = project.folder / "kept%20here?" if artifacts else project.storage / "mlartifacts"
        assert len(list(root.glob("vico/*/artifacts/config.yaml"))) == 1
        (version,) = rows(project.storage, "select value from tags where key = 'vico.storage'")
        assert version == str(project.storage)


@pytest.mark.slow
def test_a_copied_store_writes_nothing_into_the_original(project, tmp_path):
    project.vico("run")
    original = files(project.storage)
    copy = TinyProject(tmp_path / "copy")
    shutil.copytree(project.folder, copy.folder, dirs_exist_ok=True)
    assert problems(copy, code=1) == ["mlflow_artifacts"]
    assert str(project.storage) in copy.last_output and "vico audit --reap" in copy.last_output
    assert files(project.storage) == original, "nor does the report of the audit go there"
    assert "MLflow now has all of it" in copy.vico("run")
    assert problems(copy) == []
    copy.vico("run", "--set", "seed=8")
    assert problems(copy) == []
    assert {name: content for name, content in files(project.storage).items() if name in original} == original
    assert set(files(project.storage)) == set(original)
    client = mlflow.MlflowClient(f"sqlite:///{copy.storage}/mlflow.db")
    shown = client.search_runs([client.get_experiment_by_name("vico").experiment_id])
    assert len(shown) == 8
    for run in shown:
        assert run.info.artifact_uri.startswith(f"{copy.storage.as_uri()}/mlartifacts/vico/")
        folder = copy.storage / "mlartifacts" / "vico" / run.info.run_id / "artifacts"
        is_parent = run.data.tags["vico.stage"] == "pipeline"
        assert (folder / "config.yaml").is_file() == is_parent


def test_a_copy_that_is_used_at_once_keeps_its_own_artifacts(project, tmp_path):
    """Without an audit in between, and without the artifacts of the original."""
    project.vico("run", code=1, TINY_FAIL="total:0")
    copy = TinyProject(tmp_path / "copy")
    shutil.copytree(project.folder, copy.folder, dirs_exist_ok=True)
    shutil.rmtree(copy.storage / "mlartifacts")
    original = files(project.storage)
    copy.vico("run")
    assert files(project.storage) == original
    assert len(list(copy.storage.glob("mlartifacts/vico/*/artifacts/config.yaml"))) == 1
    assert problems(copy) == []


@pytest.mark.slow
def test_reap_corrects_a_moved_store_and_sends_its_debts(project, tmp_path):
    project.vico("run")
    database = project.storage / "mlflow.db"
    shutil.move(database, tmp_path / "kept.db")
    database.mkdir()
    (project.folder / "site.yaml").write_text(IMPATIENT)
    assert "lacks the latest data" in project.vico("run", "--set", "seed=8")
    (project.folder / "site.yaml").write_text(TRACKED)
    database.rmdir()
    shutil.move(tmp_path / "kept.db", database)
    second, first = project.runs()
    moved = TinyProject(tmp_path / "second place")
    shutil.copytree(project.folder, moved.folder, dirs_exist_ok=True)
    shutil.rmtree(project.folder)
    assert problems(moved, second, code=1) == ["mlflow_incomplete"]
    moved.vico("audit", "--reap")
    assert moved.errors.splitlines() == [
        f"corrected in MLflow: its artifacts are kept in {project.storage}/mlartifacts, "
        f"but the store is {moved.storage}",
        f"sent to MLflow: what it lacked of run {second}",
    ]
    for run in (first, second):
        assert problems(moved, run) == []
    assert not project.folder.exists()
    statuses = rows(moved.storage, "select status from runs")
    assert statuses == list(ALL_FINISHED.values()) * 2


@pytest.mark.slow
def test_a_shared_database_with_artifacts_in_a_place_that_is_gone_takes_no_files(project, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shutil.move(project.storage / "mlflow.db", shared)
    site = TRACKED.replace("}", f", uri: 'sqlite:///{shared}/mlflow.db'}}")
    (project.folder / "site.yaml").write_text(site)
    project.vico("run")
    other = TinyProject(tmp_path / "other")
    (other.folder / "site.yaml").write_text(site)
    other.vico("run", "--set", "seed=8")
    assert problems(other) == [], "artifacts of an experiment stay together"
    shutil.rmtree(project.folder)
    output = other.vico("run", "--set", "seed=9")
    assert (
        "lacks the latest data" in output
        and f"and {project.storage} is gone; bring that folder back" in output
    )
    assert not project.folder.exists()
    assert set(problems(other, code=1)) == {"mlflow_artifacts", "mlflow_incomplete"}
    assert json.loads(other.vico("status", "latest", "--json"))["state"] == "done"
