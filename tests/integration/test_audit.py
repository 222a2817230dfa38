"""Real tiny runs, each damaged in one way: the audit names stage and path, and reports nothing else."""

import errno
import hashlib
import json
import os
import shutil

import mlflow
import pytest

from cluster.site import Site
from pipeline.audit.run import audit_run
from pipeline.storage.folder import FolderStorage
from pipeline.tracking.artifact_roots import correct_moved_roots
from tests.integration.tiny_pipeline.project import TRACKED, TinyProject
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project with a run that was killed once and resumed, and that is in a real sqlite MLflow."""
    project = TinyProject(tmp_path_factory.mktemp("audited"))
    (project.folder / "site.yaml").write_text(TRACKED)
    project.vico("run", code=-9, TINY_KILL="square:2")
    project.vico("run")
    return project


@pytest.fixture
def project(finished, tmp_path):
    """A copy to damage; MLflow's database moves with the store, corrected as `vico run` does it."""
    copy = TinyProject(tmp_path / "copy")
    shutil.copytree(finished.storage, copy.storage)
    assert len(correct_moved_roots(Site(storage=copy.storage))) == 1
    return copy


def problems(project, *, tracking=False, run="latest"):
    """Return (stage, kind, path below the stage's folder) of each problem."""
    site = Site.model_validate({"storage": str(project.storage), "tracking": {"enabled": tracking}})
    findings = audit_run(site, run)
    assert json.loads(json.dumps(findings.as_json()))["ok"] == (not findings.problems)
    return [
        (problem.stage, problem.kind, problem.path.replace(f"{project.stage(problem.stage)}/", ""))
        if problem.stage != "pipeline"
        else (problem.stage, problem.kind, problem.path)
        for problem in findings.problems
    ]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))


def test_nothing_is_reported_on_the_untouched_run(finished, project):
    answer = json.loads(finished.vico("audit", "latest", "--json"))
    assert answer["problems"] == [] and answer["ok"]
    assert answer["checked"]["stages"] == 3
    assert answer["checked"]["files"] == 14
    assert answer["checked"]["mlflow_runs"] == 4
    assert answer["checked"]["mlflow_metrics"] > 12, "what the stages report, and samples of the node"
    assert problems(project, tracking=True) == [], "nor on a store that was moved"
    assert "0 problems; checked 3 stages" in finished.vico("audit", "latest")


def test_an_audit_changes_nothing_in_the_store(project):
    before = {path: path.read_bytes() for path in project.storage.rglob("*") if path.is_file()}
    problems(project)
    assert {path: path.read_bytes() for path in project.storage.rglob("*") if path.is_file()} == before


def test_a_problem_ends_with_code_1_and_its_path(project):
    path = project.stage("draw") / "output" / "part-1.txt"
    path.unlink()
    answer = json.loads(project.vico("audit", "latest", "--json", code=1))
    (problem,) = answer["problems"]
    assert not answer["ok"]
    assert problem["stage"] == "draw" and problem["path"] == str(path)
    assert "output_missing" in project.vico("audit", "latest", code=1)


def test_a_file_swapped_for_one_of_equal_size(project):
    path = project.stage("square") / "output" / "part-2.txt"
    path.write_bytes(path.read_bytes()[::-1])
    assert problems(project) == [("square", "output_content", "output/part-2.txt")]


def test_a_truncated_file(project):
    path = project.stage("total") / "output" / "copy" / "part-3.txt"
    path.write_bytes(path.read_bytes()[:-20])
    assert problems(project) == [("total", "output_size", "output/copy/part-3.txt")]


def test_a_file_that_is_not_recorded(project):
    (project.stage("draw") / "output" / "part-9.txt").write_text("0.5")
    assert problems(project) == [("draw", "output_unrecorded", "output/part-9.txt")]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["counts"].update(parts=5),
        lambda record: record.update(seconds=1.0),
        lambda record: record["packages"].update(torch="9.9"),
        lambda record: record["git"].update(dirty=not record["git"]["dirty"]),
    ],
    ids=["counts", "seconds", "packages", "git"],
)
def test_a_record_edited_by_hand_in_a_field_that_nothing_else_checks(project, change):
    edit(project.stage("square") / "record.json", change)
    assert problems(project) == [("square", "record", "record.json")]


def test_a_record_with_other_outputs_or_another_config_is_not_believed(project):
    path = project.stage("total") / "record.json"
    edit(path, lambda record: record["outputs"]["total.json"].update(sha256="0" * 64))
    assert problems(project) == [("total", "record", "record.json")]
    path.write_text("{")
    assert problems(project) == [("total", "record", "record.json")]
    path.unlink()
    assert problems(project) == [("total", "record_missing", "record.json")]


def test_a_record_that_names_other_inputs(project):
    edit(project.stage("square") / "record.json", lambda record: record["inputs"].update(draw="0" * 64))
    assert [(stage, kind) for stage, kind, _ in problems(project)] == [
        ("square", "record"),
        ("square", "attempt"),
        ("square", "input"),
    ]


def test_records_that_changed_at_their_source(project):
    (run,) = project.storage.glob("runs/*/run.json")
    edit(run, lambda content: content["config"]["inputs"]["records"].update(num_samples=5))
    assert [(stage, kind) for stage, kind, _ in problems(project)] == [("draw", "input_changed")]


def test_a_run_file_edited_by_hand(project):
    (run,) = project.storage.glob("runs/*/run.json")
    edit(run, lambda content: content["config"]["draw"].update(scale=0.2))
    assert [(stage, kind) for stage, kind, _ in problems(project)] == [("draw", "config")]
    edit(run, lambda content: content.update(pipeline="0" * 64))
    assert ("pipeline", "run", str(run)) in problems(project)


def test_a_commit_that_is_not_in_the_checkout(project):
    edit(project.stage("draw") / "record.json", lambda record: record["git"].update(commit="0" * 40))
    assert ("draw", "git", "0" * 40) in problems(project)


def test_a_missing_patch_of_uncommitted_code(project):
    patch = project.stage("draw") / "attempts" / "1" / "sources.patch"
    patch.write_text("diff --git a/x b/x\n")
    digest = hashlib.sha256(patch.read_bytes()).hexdigest()
    git = {**project.record("draw")["git"], "dirty": True, "patch": digest}
    project.edit_record("draw", git=git)
    assert problems(project) == []
    patch.unlink()
    assert problems(project) == [("draw", "git", "attempts/1/sources.patch")]


def test_steps_that_are_missing_or_repeated(project):
    path = project.stage("square") / "attempts" / "1" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    path.write_text(lines[0])
    assert problems(project) == [("square", "metrics_gap", "attempts")]
    path.write_text("".join([*lines, lines[1]]))
    assert problems(project) == [("square", "metrics_overlap", "attempts/1/metrics.jsonl")]
    path.write_text("".join([*lines, "{}\n"]))
    assert problems(project) == [("square", "metrics", "attempts/1/metrics.jsonl")]


def test_a_clock_that_jumped_is_a_note_and_not_a_problem(project):
    path = project.stage("draw") / "attempts" / "1" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["time"] -= 3600
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = json.loads(project.vico("audit", "latest", "--json", "--site", str(untracked(project))))
    assert answer["problems"] == []
    assert "draw: the clock jumped back 3600 s before step 2" in answer["notes"]


def untracked(project):
    path = project.folder / "untracked.yaml"
    path.write_text("name: untracked\ntracking: {enabled: false}\n")
    return path


def test_a_stage_made_again_with_other_bytes_by_another_run(project):
    folder = project.stage("draw")
    (folder / "superseded" / "1").mkdir(parents=True)
    shutil.copy(folder / "record.json", folder / "superseded" / "1")
    edit(folder / "record.json", lambda record: record.update(run="another", attempt=2))
    assert ("draw", "superseded", "superseded/1/record.json") not in problems(project)
    edit(folder / "superseded/1/record.json", lambda record: record.update(output_digest="0" * 64))
    assert ("draw", "superseded", "superseded/1/record.json") in problems(project)


def test_what_another_run_repaired_is_not_a_problem_of_the_first(project):
    (project.stage("draw") / "output" / "part-1.txt").unlink()
    (first,) = project.runs()
    project.vico("run")
    assert project.runs()[1:] == [first]
    assert problems(project, tracking=True, run=first) == []
    assert problems(project) == []


@pytest.fixture
def client(project):
    return mlflow.MlflowClient(f"sqlite:///{project.storage}/mlflow.db")


def mlflow_id(project, stage):
    (path,) = project.storage.glob("runs/*/run.json")
    return json.loads(path.read_text())["stages"][stage]["mlflow_run_id"]


def test_a_deleted_mlflow_run(project, client):
    run_id = mlflow_id(project, "square")
    client.delete_run(run_id)
    assert problems(project, tracking=True) == [("square", "mlflow_missing", f"mlflow:{run_id}")]


def point_state_to_copy(finished, project):
    """Make the copy's mlflow.json name the copy's database; that of another database would not be used."""
    (path,) = project.storage.glob("runs/*/mlflow.json")
    path.write_text(path.read_text().replace(str(finished.storage), str(project.storage)))
    assert json.loads(path.read_text())["complete"]
    return path


def test_what_an_audit_finds_missing_in_mlflow_is_sent_by_the_same_command(finished, project, client):
    """`vico run` does not compare a finished run with MLflow, unless an audit found something missing."""
    shutil.copy(finished.folder / "site.yaml", project.folder)
    point_state_to_copy(finished, project)
    client.delete_run(mlflow_id(project, "square"))
    (problem,) = json.loads(project.vico("audit", "latest", "--json", code=1))["problems"]
    assert (problem["stage"], problem["kind"]) == ("square", "mlflow_missing")
    assert "MLflow now has all of it" in project.vico("run")
    assert json.loads(project.vico("audit", "latest", "--json"))["problems"] == []
    assert "tracking" not in project.vico("run")


def test_an_audit_that_cannot_write_says_so(finished, project, client, monkeypatch):
    path = point_state_to_copy(finished, project)
    client.delete_run(mlflow_id(project, "square"))

    def full(self, path, content):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(FolderStorage, "write", full)
    findings = audit_run(Site.model_validate({"storage": str(project.storage)}), "latest")
    assert [problem.kind for problem in findings.problems] == ["mlflow_missing"]
    assert any("`vico run` will not update MLflow: mlflow.json could not" in note for note in findings.notes)
    assert json.loads(path.read_text())["complete"]


def test_metrics_params_tags_and_status_changed_in_mlflow(project, client):
    import sqlite3

    run_id = mlflow_id(project, "square")
    with sqlite3.connect(project.storage / "mlflow.db") as database:
        deleted = database.execute(
            "delete from metrics where run_uuid = ? and key = 'length' and step = 1", (run_id,)
        )
        assert deleted.rowcount == 1
        database.execute("update params set value = '3' where run_uuid = ? and key = 'power'", (run_id,))
    client.set_tag(run_id, "vico.output_digest", "0" * 64)
    client.set_terminated(run_id, "FAILED")
    assert {(stage, kind) for stage, kind, _ in problems(project, tracking=True)} == {
        ("square", "mlflow_metrics"),
        ("square", "mlflow_params"),
        ("square", "mlflow_tags"),
        ("square", "mlflow_status"),
    }


def test_a_database_that_is_missing_or_damaged(project):
    path = project.storage / "mlflow.db"
    path.unlink()
    assert problems(project, tracking=True) == [("pipeline", "mlflow_missing", str(path))]
    assert not path.exists()
    path.write_text("no database")
    kinds = [(stage, kind) for stage, kind, _ in problems(project, tracking=True)]
    assert kinds == [("pipeline", "mlflow_incomplete"), ("pipeline", "mlflow_unreachable")]


def test_reap_closes_what_a_killed_driver_left_running_and_nothing_else(finished, tmp_path):
    project = TinyProject(tmp_path / "killed")
    shutil.copy(finished.folder / "site.yaml", project.folder)
    project.storage.mkdir()
    shutil.copy(finished.storage / "mlflow.db", project.storage)
    process, _ = project.pause("square:1", "--set", "seed=8")
    client = mlflow.MlflowClient(f"sqlite:///{project.storage}/mlflow.db")
    wait_until(lambda: len(running(client)) == 2, process)
    (run,) = project.runs()
    project.vico("audit", "--reap")
    alive = running(client)
    assert project.errors == "" and len(alive) == 2, "its driver is alive"
    process.kill()
    process.wait()
    project.vico("audit", "--reap")
    assert project.errors == f"closed in MLflow: run {run}: interrupted\n"
    assert running(client) == []
    assert json.loads(project.vico("audit", "latest", "--json"))["problems"] == []
    for mlflow_run in alive:
        client.update_run(mlflow_run.info.run_id, status="RUNNING")
    shutil.rmtree(project.storage / "runs" / run)
    own_id = (project.storage / "storage-id").read_text()
    (project.storage / "storage-id").write_text("of a storage at the same path of another machine")
    project.vico("audit", "--reap")
    assert project.errors == "" and len(running(client)) == 2
    (project.storage / "storage-id").write_text(own_id)
    project.vico("audit", "--reap")
    assert project.errors == f"closed in MLflow: run {run}: its folder is gone\n"
    assert running(client) == []


def test_reap_sends_what_mlflow_lacks_of_an_older_run(finished, project):
    """The same command now belongs to a newer run, so it sends nothing of this one."""
    import sqlite3

    shutil.copy(finished.folder / "site.yaml", project.folder)
    older = mlflow_id(project, "square")
    (first,) = project.runs()
    project.vico("run", "--force", "total")
    assert len(project.runs()) == 2
    with sqlite3.connect(project.storage / "mlflow.db") as database:
        for key, step in (("length", 1), ("summary/parts", 0)):  # the second metric has no step left
            deleted = database.execute(
                "delete from metrics where run_uuid = ? and key = ? and step = ?", (older, key, step)
            )
            assert deleted.rowcount == 1, key

    def kinds():
        return [kind for _, kind, _ in problems(project, tracking=True, run=first)]

    assert kinds() == ["mlflow_metrics"] * 2
    assert kinds() == ["mlflow_incomplete", "mlflow_metrics", "mlflow_metrics"]
    project.vico("audit", "--reap")
    assert project.errors == f"sent to MLflow: what it lacked of run {first}\n"
    assert kinds() == []
    project.vico("audit", "--reap")
    assert project.errors == ""


def test_reap_needs_mlflow_and_audit_a_run(project):
    project.vico("audit", "--reap", code=2)
    assert "tracking.enabled is false" in project.errors
    project.vico("audit", code=2)
    assert "RUN is missing" in project.errors


def running(client):
    (experiment,) = client.search_experiments(filter_string="name = 'vico'")
    return client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")


@pytest.mark.parametrize("target", ["a folder", "a file", "nothing"])
def test_a_link_inside_an_output(project, tmp_path, target):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("x")
    leads_to = {"a folder": elsewhere, "a file": elsewhere / "file", "nothing": elsewhere / "absent"}[target]
    (project.stage("draw") / "output" / "extra").symlink_to(leads_to)
    unrecorded = [("draw", "output_unrecorded", "output/extra")] if target == "a file" else []
    assert problems(project) == [("draw", "link", "output/extra"), *unrecorded]


def test_links_in_the_place_of_a_stages_own_files_and_folders(project, tmp_path):
    """Their bytes are the recorded ones now, but can change without any change in the store."""
    file, folder = project.stage("square") / "output" / "part-2.txt", project.stage("total") / "attempts"
    shutil.move(file, tmp_path / "part")
    file.symlink_to(tmp_path / "part")
    shutil.move(folder, tmp_path / "attempts")
    folder.symlink_to(tmp_path / "attempts")
    assert problems(project) == [("square", "link", "output/part-2.txt"), ("total", "link", "attempts")]
    stage = project.stage("draw")
    shutil.move(stage, tmp_path / "draw")
    stage.symlink_to(tmp_path / "draw")
    assert problems(project)[0] == ("draw", "link", str(stage))


def test_a_fifo_in_an_output_is_reported_and_does_not_hang_the_audit(project):
    part = project.stage("draw") / "output" / "part-1.txt"
    part.unlink()
    os.mkfifo(part)
    assert problems(project) == [
        ("draw", "link", "output/part-1.txt"),
        ("draw", "output_missing", "output/part-1.txt"),
    ]


@pytest.mark.parametrize("field", ["packages", "sources"])
def test_code_and_packages_of_an_earlier_attempt_edited_afterwards(project, field):
    """Attempt 1 was killed; its parts are in the result of attempt 2."""
    path = project.stage("square") / "attempts" / "1" / "attempt.json"
    assert project.record("square")["attempt"] == 2
    edit(path, lambda attempt: attempt[field].update({next(iter(attempt[field])): "0"}))
    assert ("square", "attempt", "attempts/1/attempt.json") in problems(project)
    assert {(stage, kind) for stage, kind, _ in problems(project)} == {("square", "attempt")}


def test_what_the_record_says_of_earlier_attempts_is_compared_with_them(project):
    facts = project.record("square")["facts"]
    project.edit_record("square", facts={**facts, "packages_of_attempts": {"1": {"torch": "9.9"}}})
    assert problems(project) == [("square", "attempt", "attempts/1/attempt.json")]


def test_reports_of_workers_that_were_added_or_damaged(project):
    path = project.stage("square") / "attempts" / "2" / "workers.ndjson"
    path.write_text(json.dumps({"host": "h", "pid": 1, "digest": "0" * 64}) + "\n")
    assert problems(project) == [("square", "attempt", "attempts/2/workers.ndjson")]
    path.write_text("{")
    assert problems(project) == [("square", "attempt", "attempts/2/workers.ndjson")]
