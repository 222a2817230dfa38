"""Seals of real tiny runs: what an audit alone cannot find is found by comparing with one."""

import hashlib
import json
import os
import shutil
import sqlite3

import mlflow
import pytest

from cluster.site import Site
from pipeline.json_files import OutputFile
from pipeline.results.records import outputs_digest
from pipeline.tracking.artifact_roots import correct_moved_roots
from tests.integration.tiny_pipeline.project import TRACKED, TinyProject


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A project with a run that was killed once and resumed, and its seal in a folder outside of the
    store."""
    project = TinyProject(tmp_path_factory.mktemp("sealed"))
    (project.folder / "site.yaml").write_text(TRACKED)
    project.vico("run", code=-9, TINY_KILL="square:2")
    project.vico("run")
    project.vico("audit", "latest", "--seal", "run.seal")
    return project


@pytest.fixture
def project(sealed, tmp_path):
    """A copy of store and seal to change; MLflow's database moves with the store."""
    copy = TinyProject(tmp_path / "copy")
    shutil.copytree(sealed.storage, copy.storage)
    correct_moved_roots(Site(storage=copy.storage))
    for name in ("site.yaml", "run.seal"):
        shutil.copy(sealed.folder / name, copy.folder)
    return copy


def against(project, code=1):
    answer = json.loads(project.vico("audit", "latest", "--against", "run.seal", "--json", code=code))
    return [(problem["stage"], problem["kind"], problem["path"]) for problem in answer["problems"]]


def test_an_unchanged_run_also_after_the_store_was_moved_and_the_command_given_again(project):
    assert against(project, code=0) == []
    project.vico("run")
    assert against(project, code=0) == []
    text = project.vico("audit", "latest", "--against", "run.seal")
    assert json.loads((project.folder / "run.seal").read_text())["digest"] in text


def test_a_fully_resealed_edit_of_the_last_stage(project):
    """Output, record and MLflow are rewritten alike: a plain audit has nothing to compare them with."""
    folder = project.stage("total")
    path = folder / "output" / "total.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"7") + b" ")
    record = project.record("total")
    outputs = {name: OutputFile(**file) for name, file in record["outputs"].items()}
    data = path.read_bytes()
    outputs["total.json"] = OutputFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    record["outputs"]["total.json"] = outputs["total.json"].model_dump()
    project.edit_record("total", outputs=record["outputs"], output_digest=outputs_digest(outputs))
    client = mlflow.MlflowClient(f"sqlite:///{project.storage}/mlflow.db")
    (run_file,) = project.storage.glob("runs/*/run.json")
    run_id = json.loads(run_file.read_text())["stages"]["total"]["mlflow_run_id"]
    client.set_tag(run_id, "vico.output_digest", outputs_digest(outputs))
    assert json.loads(project.vico("audit", "latest", "--json"))["problems"] == []
    reported = against(project)
    assert ("total", "seal_changed", "total/output/total.json") in reported
    assert ("total", "seal_record", "records.total.output_digest") in reported
    assert ("total", "seal_mlflow", "mlflow.total.tags.vico.output_digest") in reported
    assert {stage for stage, _, _ in reported} == {"total"}


def test_files_that_were_added_removed_or_changed_in_outputs_and_attempts(project):
    (project.stage("draw") / "output" / "new.txt").write_text("new")
    (project.stage("square") / "output" / "part-1.txt").unlink()
    log = next(path for path in project.stage("draw").glob("attempts/*/*") if path.suffix == ".log")
    log.write_text("edited")
    reported = against(project)
    assert ("draw", "seal_added", "draw/output/new.txt") in reported
    assert ("square", "seal_removed", "square/output/part-1.txt") in reported
    assert ("draw", "seal_changed", f"draw/{log.relative_to(project.stage('draw'))}") in reported


def test_values_that_were_changed_in_mlflow_and_run_json(project):
    with sqlite3.connect(project.storage / "mlflow.db") as database:
        changed = database.execute("update metrics set value = value + 1e-14 where key = 'summary/parts'")
        assert changed.rowcount
    (run_file,) = project.storage.glob("runs/*/run.json")
    content = json.loads(run_file.read_text())
    run_file.write_text(json.dumps({**content, "experiment": "vico", "created": "2020-01-01T00:00:00+00:00"}))
    kinds = {(kind, path) for _, kind, path in against(project)}
    assert ("seal_run", "run.created") in kinds


@pytest.mark.parametrize("option", ["--seal", "--against"])
def test_a_seal_in_the_storage_is_refused(project, option):
    inside = project.storage / "run.seal"
    shutil.copy(project.folder / "run.seal", inside)
    os.symlink(project.storage, project.folder / "elsewhere")
    for path in (inside, project.folder / "elsewhere" / "run.seal"):
        project.vico("audit", "latest", option, str(path), code=2)
        assert project.errors.count("\n") == 1 and "is in the storage" in project.errors


def test_seals_that_are_damaged_foreign_or_of_another_version(project):
    path = project.folder / "run.seal"
    content = json.loads(path.read_text())

    def refused(data, words):
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        project.vico("audit", "latest", "--against", "run.seal", code=2)
        assert project.errors.count("\n") == 1 and words in project.errors, project.errors

    good = path.read_bytes()
    refused(good[:-20], "is damaged")
    refused(good.replace(b'"bytes":', b'"bytes": ', 1), "is damaged or was edited")
    refused({**content, "sealed": "2020"}, "is damaged or was edited")
    refused({**content, "schema": 2}, "has schema 2")
    refused({"run": 1}, "is not a seal")
    refused(b"\xff\xfe", "is damaged")
    refused(b"[" * 5000, "is damaged")
    path.unlink()
    os.mkfifo(path)
    project.vico("audit", "latest", "--against", "run.seal", code=2)
    assert "is not a regular file" in project.errors
    project.vico("audit", "latest", "--against", "absent.seal", code=2)
    assert project.errors.count("\n") == 1 and "cannot be read" in project.errors


def test_the_seal_of_another_run(project):
    project.vico("run", "--set", "seed=8")
    project.vico("audit", "latest", "--against", "run.seal", code=2)
    assert "is of run" in project.errors and project.errors.count("\n") == 1


def test_what_is_not_sealed(project):
    project.vico("audit", "latest", "--seal", "run.seal", code=2)
    assert "exists" in project.errors
    project.vico("audit", "latest", "--seal", "new/run.seal", code=2)
    assert "does not exist; create it" in project.errors
    project.vico("audit", "latest", "--seal", "a", "--against", "run.seal", code=2)
    assert "give one of them" in project.errors
    (project.stage("draw") / "output" / "part-1.txt").write_text("x")
    assert "no seal was written" in project.vico("audit", "latest", "--seal", "new.seal", code=1)
    assert not (project.folder / "new.seal").exists()
    project.vico("run", "--until", "draw", "--set", "seed=9", code=-9, TINY_KILL="draw:2")
    project.vico("audit", "latest", "--seal", "new.seal", code=2)
    assert "is not done" in project.errors
