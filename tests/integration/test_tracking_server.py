"""A real MLflow server on loopback: outages during training, the model registry, and passwords."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from cluster.metric_lines import last_metric_line
from pipeline.tracking.desired import DesiredRun
from pipeline.tracking.desired_outputs import ModelOutput
from pipeline.tracking.outputs import CANDIDATE, OutputSender
from pipeline.tracking.sent import SentRun
from tests.integration.mlflow_server import MlflowServer
from tests.integration.tiny_pipeline.project import ROOT, TinyProject
from tests.integration.tracked_training import EXPERIMENT, FINGERPRINT, STOP_FILE
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that is running when a test begins."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def start_training(storage: Path, num_steps: int, uri: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.integration.tracked_training", str(storage), str(num_steps), uri]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def last_step(path: Path) -> int:
    """Return the last step of a metric file, 0 if there is none."""
    line = last_metric_line(path) if path.exists() else None
    return line.step if line else 0


def last_sent_step(storage: Path) -> int:
    """Return the last step that the training's tracking thread noted as sent."""
    try:
        (state,) = storage.glob("runs/*/mlflow.json")
        return json.loads(state.read_text())["runs"]["train"]["steps"].get("loss", 0)
    except (ValueError, KeyError):
        return 0


@pytest.mark.parametrize("outage_s", [3, pytest.param(45, marks=pytest.mark.slow)])
def test_a_server_killed_during_training_gets_every_step_later_once(server, tmp_path, outage_s):
    """The server dies; the training continues, is killed and resumed during the outage; the server comes
    back."""
    storage = tmp_path / "runs"
    first = start_training(storage, 1_000_000, server.uri)
    attempts = storage / f"train/{FINGERPRINT}/attempts"
    wait_until(lambda: last_sent_step(storage) > 50, first)
    server.kill()
    try:
        at_death = last_step(attempts / "1/metrics.jsonl")
        wait_until(lambda: last_step(attempts / "1/metrics.jsonl") > at_death + 40, first)
        first.send_signal(signal.SIGKILL)
        first.wait()
        reached = last_step(attempts / "1/metrics.jsonl")
        second = start_training(storage, 1_000_000, server.uri)
        wait_until(lambda: last_step(attempts / "2/metrics.jsonl") > reached, second)
        resumed = last_step(attempts / "2/metrics.jsonl")
        time.sleep(outage_s)
        assert last_step(attempts / "2/metrics.jsonl") > resumed, "the training continued without the server"
    finally:
        server.start()
    (storage / STOP_FILE).touch()
    assert second.communicate(timeout=PATIENCE_S)[0].strip() == "None", "nothing is left unsent"
    num_steps = last_step(attempts / "2/metrics.jsonl")
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (state,) = storage.glob("runs/*/mlflow.json")
    run_id = json.loads(state.read_text())["runs"]["train"]["id"]
    run = state.parent.name
    children = client.search_runs([experiment], f"tags.`vico.run` = '{run}' and tags.`vico.stage` = 'train'")
    assert [child.info.run_id for child in children] == [run_id], "the resumed run continues its child"
    assert children[0].info.status == "FINISHED"
    points = client.get_metric_history(run_id, "loss")
    assert sorted(point.step for point in points) == list(range(1, num_steps + 1)), "each once"
    assert all(point.value == pytest.approx(1 / point.step) for point in points)


@pytest.mark.slow
def test_a_server_that_is_down_during_a_whole_run_gets_it_from_the_same_command(server, tmp_path):
    project = TinyProject(tmp_path)
    site = project.folder / "site.yaml"
    tracking = {"uri": server.uri, "interval_s": 0.1, "finish_timeout_s": 5}
    site.write_text(json.dumps({"name": "tiny", "tracking": tracking}))
    server.kill()
    try:
        output = project.vico("run", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
        assert "lacks the latest data of run" in output
        project.vico("audit", "--reap", code=1, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    finally:
        server.start()
    site.write_text(json.dumps({"name": "tiny", "tracking": {**tracking, "finish_timeout_s": 300}}))
    assert "MLflow now has all of it" in project.vico("run")
    audit = json.loads(project.vico("audit", "latest", "--json"))
    assert audit["problems"] == [] and audit["checked"]["mlflow_runs"] == 4
    assert "MLflow" not in project.vico("run")


def export_run(digest: str, *, is_candidate: bool = True) -> DesiredRun:
    """Return an export stage, with what the registry uses of it."""
    return DesiredRun(
        name="export",
        began="1",
        title="export",
        status="FINISHED",
        start_s=0.0,
        end_s=1.0,
        params={},
        tags={"vico.run": "a-run", "vico.fingerprint": "f" * 64},
        models=(ModelOutput("export-model", f"file:///elsewhere/{digest}", digest),),
        registers_as="registry: a/test",
        is_candidate=is_candidate,
        version_tags={
            "vico.quality_kept": "0.98",
            "vico.tokens_saved": "0.4",
            "vico.test_questions": "316",
            "vico.address": "machine:/model",
        },
    )


@pytest.mark.parametrize("store", ["server", "database"])
def test_exported_models_become_versions_and_the_newest_is_the_candidate(request, tmp_path, store):
    is_server = store == "server"
    uri = request.getfixturevalue("server").uri if is_server else f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("registry")
    for number, digest in enumerate(["d1", "d2"], start=1):
        run = client.create_run(experiment).info.run_id
        for sent in (SentRun(id=run, began="1"), SentRun(id=run, began="1")):  # the second: our note is lost
            sender = OutputSender(client, uri, experiment, export_run(digest), sent)
            sender.send_models()
            sender.send_versions()
            sender.send_versions()
            assert sent.versions == {f"export-model:{digest}": str(number)}
        candidate = client.get_model_version_by_alias("registry_ a_test", CANDIDATE)
        assert (int(candidate.version), candidate.run_id) == (number, run)
        assert candidate.tags["vico.digest"] == digest
        assert candidate.tags["vico.uri"] == f"file:///elsewhere/{digest}"
        assert (
            candidate.tags["vico.quality_kept"] == "0.98" and "0.980 of the quality" in candidate.description
        )
        parent = SentRun(id=client.create_run(experiment).info.run_id, began="1")
        for _ in range(2):
            replace(sender, sent=parent).link_models(sent.models)
            parent.models.clear()  # the note is lost
        [shown] = json.loads(client.get_logged_model(*sent.models.values()).tags["mlflow.modelVersions"])
        assert (shown["name"], int(shown["version"])) == (candidate.name, number), "on the pages of both runs"
        [output] = client.get_run(parent.id).outputs.model_outputs
        assert [output.model_id] == list(sent.models.values())
    assert len(client.search_model_versions("name = 'registry_ a_test'")) == 2


def test_a_version_that_does_not_pass_leaves_the_candidate_until_it_is_accepted(server):
    client = mlflow.MlflowClient(server.uri)
    experiment = client.create_experiment("gate")
    run = client.create_run(experiment).info.run_id
    sent = SentRun(id=run, began="1")
    for digest, is_candidate, candidate in (("g1", True, "g1"), ("g2", False, "g1"), ("g2", True, "g2")):
        desired = replace(export_run(digest, is_candidate=is_candidate), registers_as="gate")
        sender = OutputSender(client, server.uri, experiment, desired, sent)
        sender.send_models()
        sender.send_versions()
        assert client.get_model_version_by_alias("gate", CANDIDATE).tags["vico.digest"] == candidate
    assert len(client.search_model_versions("name = 'gate'")) == 2


def test_secrets_are_written_nowhere(server, tmp_path):
    """Secrets in the environment, the URL of the server, a hook and --set reach no file, log or MLflow
    run."""
    project = TinyProject(tmp_path / "project")
    planted = secrets.token_hex(8)  # not a word of this file, which the patch of an attempt may have
    address = server.uri.removeprefix("http://")
    hook = {"url": f"http://me:{planted}-hook@127.0.0.1:9/"}
    for number, host in enumerate((address, "127.0.0.1:9")):  # one answers, the other does not
        uri = f"http://me:{planted}-uri@{host}"
        content = {"name": "tiny", "tracking": {"uri": uri, "interval_s": 0.1}, "hook": hook}
        (project.folder / "site.yaml").write_text(json.dumps(content))
        environment = {"HF_TOKEN": f"{planted}-token", "AWS_SECRET_ACCESS_KEY": f"{planted}-key"}
        project.vico("run", "--set", f"seed={number}", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", **environment)
        printed = project.errors + project.last_output
        project.vico("audit", "latest", code=number, **environment)  # 1: MLflow lacks the run
        assert planted not in printed + project.errors + project.last_output
    project.vico("run", "--set", f"inputs.model=https://me:{planted}-set@models/x", code=2)
    assert "inputs.model holds a password" in project.errors and planted not in project.errors
    project.close()
    folders = [project.storage, server.folder]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 50 and server.database in files
    assert [path for path in files if planted.encode() in path.read_bytes()] == []
