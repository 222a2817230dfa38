"""Real runs with a real MLflow on sqlite: the tree of runs, kills, failures, outages, reuse."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from cluster.site import Site
from cluster.site_files import load_site
from pipeline.results.records import outputs_digest
from pipeline.results.stage_folder import StageFolder
from pipeline.tracking.sent import STATE_FILE, SentState, is_complete
from pipeline.tracking.sync import RunSync
from pipeline.tracking.thread import sync_once
from tests.integration.tiny_pipeline.project import ROOT, TRACKED, TinyProject
from tests.integration.tracked_training import CHECKPOINT_EVERY, EXPERIMENT, FINGERPRINT
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> bytes:
    """A database without runs. Creating one takes seconds, which most tests need not spend."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def project(tmp_path, empty_database):
    project = TinyProject(tmp_path / "project")
    (project.folder / "site.yaml").write_text(TRACKED)
    project.storage.mkdir()
    (project.storage / "mlflow.db").write_bytes(empty_database)
    yield project
    project.close()


class Shown:
    """What MLflow shows of a storage folder."""

    def __init__(self, storage: Path, experiment: str = "vico"):
        self.client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
        self.experiment_id = self.client.get_experiment_by_name(experiment).experiment_id
        self.runs = self.client.search_runs([self.experiment_id], max_results=100)

    def run(self, stage: str, run: str | None = None) -> Run:
        """Return the MLflow run of a stage (or `pipeline`) that was not superseded; there must be exactly
        one."""
        (shown,) = [
            shown
            for shown in self.runs
            if shown.data.tags["vico.stage"] == stage
            and "vico.superseded" not in shown.data.tags
            and run in (None, shown.data.tags["vico.run"])
        ]
        return shown

    def steps(self, stage: str, metric: str) -> list[int]:
        history = self.client.get_metric_history(self.run(stage).info.run_id, metric)
        return [point.step for point in sorted(history, key=lambda point: point.timestamp)]

    def statuses(self) -> dict[str, str]:
        return {run.data.tags["vico.stage"]: run.info.status for run in self.runs}


def test_a_run_is_a_tree_with_params_tags_metrics_data_sets_and_files(project):
    # With this variable MLflow itself would write everything into that run, whatever its parent.
    project.vico("run", MLFLOW_RUN_ID="0" * 32)
    shown, status = Shown(project.storage), project.status()
    parent = shown.run("pipeline")
    assert len(shown.runs) == 4
    assert set(shown.statuses().values()) == {"FINISHED"}
    assert {run.data.tags.get("mlflow.parentRunId") for run in shown.runs} == {None, parent.info.run_id}
    assert parent.data.params["draw.scale"] == "0.1"
    assert parent.data.params["inputs.records.num_samples"] == "4"
    assert parent.data.tags["mlflow.user"] and parent.data.tags["mlflow.source.name"] == "vico run"
    experiment = shown.client.get_experiment(shown.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert shown.client.list_artifacts(parent.info.run_id)[0].path == "config.yaml"
    draw, square, total = (shown.run(name) for name in ("draw", "square", "total"))
    assert draw.data.params == {"seed": "7", "num_parts": "4", "scale": "0.1"}
    record = project.record("square")
    assert square.data.tags["vico.fingerprint"] == record["fingerprint"]
    assert square.data.tags["vico.output_digest"] == record["output_digest"]
    assert square.data.tags["mlflow.source.git.commit"] == record["git"]["commit"]
    assert (square.data.tags["vico.state"], square.data.tags["vico.attempt"]) == ("done", "1")
    assert shown.steps("square", "length") == [0, 1, 2, 3]
    assert square.data.metrics["summary/parts"] == 4
    (data_set,) = [logged.dataset for logged in square.inputs.dataset_inputs]
    assert (data_set.name, data_set.digest) == ("draw", record["inputs"]["draw"][:36])
    assert json.loads(data_set.source)["digest"] == record["inputs"]["draw"]
    assert shown.client.list_artifacts(total.info.run_id, "tables")[0].path == "tables/total.json"
    ids = {stage["name"]: stage["mlflow_run_id"] for stage in status["stages"]}
    assert ids == {name: shown.run(name).info.run_id for name in ("draw", "square", "total")}
    assert status["mlflow_run_id"] == parent.info.run_id
    assert is_complete(project.storage / "runs" / status["run"], Site(storage=project.storage))


def test_after_a_kill_every_step_is_there_once_and_the_status_is_true(project):
    project.vico("run", code=-signal.SIGKILL, TINY_KILL="square:2")
    project.vico("run")
    shown = Shown(project.storage)
    assert len(shown.runs) == 4, "the second command continues the same MLflow runs"
    assert set(shown.statuses().values()) == {"FINISHED"}
    assert shown.steps("draw", "length") == [0, 1, 2, 3]
    assert shown.steps("square", "length") == [0, 1, 2, 3]
    assert shown.run("square").data.tags["vico.attempt"] == "2"
    assert shown.run("pipeline").data.tags["vico.num_commands"] == "2"


def test_failed_and_stopped_runs_show_their_status_and_resume(project):
    project.vico("run", code=1, TINY_FAIL="square:1")
    shown = Shown(project.storage)
    assert shown.statuses() == {"pipeline": "FAILED", "draw": "FINISHED", "square": "FAILED"}
    assert "square failed: RuntimeError" in shown.run("pipeline").data.tags["vico.error"]

    process, _ = project.pause("square:2")
    wait_for_status(project.storage, "square", "RUNNING")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    shown = Shown(project.storage)
    assert shown.statuses() == {"pipeline": "KILLED", "draw": "FINISHED", "square": "KILLED"}

    project.vico("run")
    shown = Shown(project.storage)
    assert set(shown.statuses().values()) == {"FINISHED"}
    assert "vico.error" not in shown.run("pipeline").data.tags
    assert shown.run("square").info.end_time > shown.run("square").info.start_time


def test_a_resumed_run_stays_in_its_experiment_and_says_so(project):
    project.vico("run", code=1, TINY_FAIL="square:1")
    output = project.vico("run", "--set", "experiment=other", "--set", "inputs.model=moved")
    (run,) = project.runs()
    assert f"run {run}: experiment=other is for new runs; MLflow has it in vico\n" in output
    stored = json.loads((project.storage / "runs" / run / "run.json").read_text())
    assert stored["config"]["inputs"]["model"] == str(project.folder / "moved")
    assert stored["config"]["experiment"] == stored["experiment"] == "vico"
    shown = Shown(project.storage)
    assert len(shown.runs) == 4
    assert shown.client.get_experiment_by_name("other") is None


def wait_for_status(storage: Path, stage: str, status: str) -> None:
    wait_until(lambda: Shown(storage).statuses().get(stage) == status, pause_s=0.2)


def test_reused_stages_name_the_run_they_come_from_and_copy_nothing(project):
    project.vico("run")
    first = project.status()["run"]
    project.vico("run", "--set", "square.power=3")
    second = project.status()["run"]
    shown = Shown(project.storage)
    draw = shown.run("draw", second)
    assert draw.info.status == "FINISHED"
    assert draw.data.tags["vico.reused_from"] == first
    assert draw.data.tags["vico.reused_child"] == shown.run("draw", first).info.run_id
    assert draw.data.params == shown.run("draw", first).data.params
    assert draw.data.metrics == {}
    assert draw.data.tags["mlflow.parentRunId"] == shown.run("pipeline", second).info.run_id
    assert shown.run("square", second).data.metrics["length"] > 0


def test_a_stage_started_from_scratch_is_a_new_child(project):
    project.vico("run", code=1, TINY_FAIL="total:0")
    before = Shown(project.storage).run("square").info.run_id
    project.vico("run", "--force", "square")
    shown = Shown(project.storage)
    old = shown.client.get_run(before)
    assert (old.data.tags["vico.superseded"], old.info.status) == ("true", "KILLED")
    assert shown.run("square").info.run_id != before
    assert shown.steps("square", "length") == [0, 1, 2, 3]


def test_runs_deleted_in_mlflow_are_created_again(project):
    project.vico("run")
    run = project.status()["run"]
    shown = Shown(project.storage)
    shown.client.delete_run(shown.run("square").info.run_id)
    site = load_site(project.folder / "site.yaml", storage=project.storage)
    assert sync_once(site, project.storage / "runs" / run) is None
    assert Shown(project.storage).steps("square", "length") == [0, 1, 2, 3]
    assert len(Shown(project.storage).runs) == 4


def test_a_lost_state_is_rebuilt_from_what_mlflow_has(project):
    """Models too: MLflow refuses an output that it already has."""
    project.vico("run")
    path = project.stage("draw") / "output" / "policy.safetensors"
    path.write_text("weights")
    folder = StageFolder(project.storage, "draw", project.stage("draw").name)
    outputs = folder.outputs()
    record = folder.record().model_copy(update={"outputs": outputs, "output_digest": outputs_digest(outputs)})
    record.write(folder.record_path)
    site = load_site(project.folder / "site.yaml", storage=project.storage)
    run_folder = project.storage / "runs" / project.status()["run"]
    for _ in range(2):
        (run_folder / STATE_FILE).unlink()
        assert sync_once(site, run_folder) is None
    shown = Shown(project.storage)
    assert len(shown.runs) == 4
    assert len(shown.client.search_logged_models([shown.experiment_id])) == 1


def test_an_outage_ends_nothing_and_what_is_missing_is_sent_later_once(tmp_path, project):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be: the database cannot be opened")
    tracking = f"tracking: {{interval_s: 0.1, uri: 'sqlite:///{blocked}/mlflow.db'}}\n"
    (project.folder / "site.yaml").write_text(f"name: tiny\n{tracking}")
    project.vico("run")
    run = project.status()["run"]
    site = load_site(project.folder / "site.yaml", storage=project.storage)
    run_folder = project.storage / "runs" / run
    log = (run_folder / "driver.log").read_text()
    assert log.count("trying again later") == 1, "an outage is logged once"
    assert log.count("lacks the latest data of run") == 1
    assert not is_complete(run_folder, site)

    blocked.unlink()
    blocked.mkdir()
    (blocked / "mlflow.db").write_bytes((project.storage / "mlflow.db").read_bytes())
    assert sync_once(site, run_folder) is None
    assert sync_once(site, run_folder) is None
    shown = Shown(blocked)
    assert set(shown.statuses().values()) == {"FINISHED"}
    assert shown.steps("square", "length") == [0, 1, 2, 3]
    assert is_complete(run_folder, site)


def test_an_unreachable_artifact_store_hides_no_metric_and_no_status(project):
    (project.folder / "site.yaml").write_text(
        "name: tiny\ntracking: {interval_s: 0.1, artifacts: 'file:///proc/nothing'}\n"
    )
    project.vico("run")
    shown = Shown(project.storage)
    assert set(shown.statuses().values()) == {"FINISHED"}
    assert shown.steps("square", "length") == [0, 1, 2, 3]
    run_folder = project.storage / "runs" / project.status()["run"]
    assert not is_complete(run_folder, Site(storage=project.storage))


def test_two_runs_create_the_database_at_the_same_time(tmp_path):
    project = TinyProject(tmp_path)
    (project.folder / "site.yaml").write_text(TRACKED)
    try:
        processes = [project.start("run", "--set", f"seed={seed}") for seed in (1, 2)]
        for process in processes:
            output, errors = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, output + errors
    finally:
        project.close()
    shown = Shown(project.storage)
    assert len(shown.runs) == 8
    assert {run.info.status for run in shown.runs} == {"FINISHED"}
    for log in project.storage.glob("runs/*/driver.log"):
        assert "MLflow" not in log.read_text()


def test_two_runs_that_open_an_experiment_at_once_tag_it_once(project, monkeypatch):
    """Of two processes that add a tag at the same time, SQLite refuses one."""
    site = Site(storage=project.storage)
    syncs = [RunSync(site, None, project.folder, SentState(uri=site.tracking_uri)) for _ in range(2)]
    meeting, tagged = threading.Barrier(2), []

    def meet_and_tag(tag, experiment, key, value):
        with suppress(threading.BrokenBarrierError):
            meeting.wait(2)  # both are here only if nothing keeps them apart
        tagged.append(key)
        tag(experiment, key, value)

    for sync in syncs:
        tag = sync.client.set_experiment_tag
        monkeypatch.setattr(sync.client, "set_experiment_tag", partial(meet_and_tag, tag))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda sync: sync._open_experiment("vico"), syncs))
    assert tagged == ["mlflow.experimentKind"]


def start_training(storage: Path, num_steps: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.integration.tracked_training", str(storage), str(num_steps)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def sends_steps_of(attempt: int, storage: Path) -> bool:
    """Return whether metrics of this attempt have begun to reach MLflow."""
    try:
        (state,) = storage.glob("runs/*/mlflow.json")
        child = json.loads(state.read_text())["runs"]["train"]
        metrics = storage / f"train/{FINGERPRINT}/attempts/{attempt}/metrics.jsonl"
        first = json.loads(metrics.read_text().splitlines()[0])["step"]
    except (ValueError, KeyError, IndexError, FileNotFoundError):
        return False
    return child["steps"].get("loss", 0) > first + CHECKPOINT_EVERY


def test_kills_during_training_lose_and_repeat_no_step(tmp_path, empty_database):
    """The process is killed three times at random moments while metrics are sent, each time with steps to
    repeat."""
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    moments = random.Random(0)
    for attempt in range(1, 4):
        process = start_training(tmp_path, 100_000)
        metrics = tmp_path / f"train/{FINGERPRINT}/attempts/{attempt}/metrics.jsonl"
        wait_until(partial(sends_steps_of, attempt, tmp_path), process)
        time.sleep(moments.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert metrics.read_text().count("\n") > CHECKPOINT_EVERY
    *whole_lines, _ = metrics.read_text().splitlines()
    num_steps = json.loads(whole_lines[-1])["step"] + 200
    process = start_training(tmp_path, num_steps)
    assert process.communicate(timeout=PATIENCE_S)[0].strip() == "None", "nothing is left unsent"
    shown = Shown(tmp_path, EXPERIMENT)
    assert len(shown.runs) == 2
    assert shown.steps("train", "loss") == list(range(1, num_steps + 1)), "each once, in order"
    run = shown.run("train")
    values = shown.client.get_metric_history(run.info.run_id, "loss")
    assert all(point.value == pytest.approx(1 / point.step) for point in values)
    attempts = shown.client.get_metric_history(run.info.run_id, "attempt")
    assert {point.value for point in attempts} == {1, 2, 3, 4}, "of a repeated step, the first stays"
