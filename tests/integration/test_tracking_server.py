"""A real MLflow server on loopback: outages in mid-training, and the model registry."""

import json
import os
import signal
import subprocess
import sys
import time

import mlflow
import pytest

from pipeline.tracking.desired import ModelOutput, Projection
from pipeline.tracking.outputs import CANDIDATE, Made
from pipeline.tracking.sent import SentRun
from tests.integration.mlflow_server import MlflowServer
from tests.integration.tiny_pipeline.project import ROOT, TinyProject, wait_for
from tests.integration.tracked_training import EXPERIMENT, FINGERPRINT, STOP_FILE


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs whenever a test begins."""
    made = MlflowServer(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


def start_training(storage, num_steps, uri) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.integration.tracked_training", str(storage), str(num_steps), uri]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def last_step(path) -> int:
    """The last step of a metrics file, 0 without one."""
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1])["step"] if whole else 0


def sent_steps(storage) -> int:
    """The last step that the tracker of the training noted as sent."""
    try:
        (state,) = storage.glob("runs/*/mlflow.json")
        return json.loads(state.read_text())["runs"]["train"]["steps"].get("loss", 0)
    except (ValueError, KeyError):
        return 0


@pytest.mark.parametrize("outage_s", [3, pytest.param(45, marks=pytest.mark.slow)])
def test_a_server_killed_in_mid_training_gets_every_step_later_once(server, tmp_path, outage_s):
    """The server dies; training goes on, is killed in the outage and goes on again; the server is back."""
    storage = tmp_path / "runs"
    first = start_training(storage, 1_000_000, server.uri)
    attempts = storage / f"train/{FINGERPRINT}/attempts"
    wait_for(lambda: sent_steps(storage) > 50, first, timeout_s=120)
    server.kill()
    try:
        at_death = last_step(attempts / "1/metrics.jsonl")
        wait_for(lambda: last_step(attempts / "1/metrics.jsonl") > at_death + 40, first, timeout_s=60)
        first.send_signal(signal.SIGKILL)
        first.wait()
        reached = last_step(attempts / "1/metrics.jsonl")
        second = start_training(storage, 1_000_000, server.uri)
        wait_for(lambda: last_step(attempts / "2/metrics.jsonl") > reached, second, timeout_s=60)
        time.sleep(outage_s)
    finally:
        server.start()
    (storage / STOP_FILE).touch()
    assert second.communicate(timeout=240)[0].strip() == "None", "nothing is left unsent"
    num_steps = last_step(attempts / "2/metrics.jsonl")
    assert num_steps > reached + 10 * outage_s, "training went on"
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (state,) = storage.glob("runs/*/mlflow.json")
    run_id = json.loads(state.read_text())["runs"]["train"]["id"]
    run = state.parent.name
    children = client.search_runs([experiment], f"tags.`vico.run` = '{run}' and tags.`vico.stage` = 'train'")
    assert [child.info.run_id for child in children] == [run_id], "the resumed run goes on with its child"
    assert children[0].info.status == "FINISHED"
    points = client.get_metric_history(run_id, "loss")
    assert sorted(point.step for point in points) == list(range(1, num_steps + 1)), "each once"
    assert all(point.value == pytest.approx(1 / point.step) for point in points)


def handed_out(digest: str) -> Projection:
    """An export stage as far as the registry can tell."""
    return Projection(
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
    )


def test_exported_models_become_versions_and_the_newest_is_the_candidate(server):
    client = mlflow.MlflowClient(server.uri)
    experiment = client.create_experiment("registry")
    for number, digest in enumerate(["d1", "d2"], start=1):
        run = client.create_run(experiment).info.run_id
        for sent in (SentRun(id=run, began="1"), SentRun(id=run, began="1")):  # the second: our note is lost
            made = Made(client, server.uri, experiment, handed_out(digest), sent)
            made.tell_models({"vico.stage": "export"})
            made.tell_versions()
            made.tell_versions()
            assert sent.versions == {f"export-model:{digest}": str(number)}
        candidate = client.get_model_version_by_alias("registry_ a_test", CANDIDATE)
        assert (int(candidate.version), candidate.run_id) == (number, run)
        assert candidate.tags["vico.digest"] == digest
        assert candidate.tags["vico.uri"] == f"file:///elsewhere/{digest}"
    assert len(client.search_model_versions("name = 'registry_ a_test'")) == 2


def test_secrets_are_written_nowhere(server, tmp_path):
    """In the environment, in the URL of the server, in a hook and in --set: not in files, logs or MLflow."""
    project = TinyProject(tmp_path / "project")
    address = server.uri.removeprefix("http://")
    hook = {"url": "http://me:planted-hook@127.0.0.1:9/"}
    for number, place in enumerate((address, "127.0.0.1:9")):  # one that answers, one that does not
        uri = f"http://me:planted-uri@{place}"
        content = {"name": "tiny", "tracking": {"uri": uri, "interval_s": 0.1}, "hook": hook}
        (project.folder / "site.yaml").write_text(json.dumps(content))
        environment = {"HF_TOKEN": "planted-token", "AWS_SECRET_ACCESS_KEY": "planted-key"}
        project.vico("run", "--set", f"seed={number}", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", **environment)
        said = project.errors + project.last_output
        project.vico("audit", "latest", **environment)
        assert "planted" not in said + project.errors + project.last_output
    project.vico("run", "--set", "inputs.model=https://me:planted-set@models/x", code=2)
    assert "inputs.model holds a password" in project.errors and "planted" not in project.errors
    project.close()
    places = [project.storage, server.folder]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 50 and server.database in files
    assert [path for path in files if b"planted" in path.read_bytes()] == []
