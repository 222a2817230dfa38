"""Commands on an object store with faults, damage, or settings that cannot work; gc, tracking, secrets."""

import json
import signal

import pytest

from tests.waiting import PATIENCE_S


def test_failing_requests_and_truncated_bodies_are_retried(machine, server, undisturbed):
    project = machine()
    server.fault = lambda number: {0: "503", 3: "stop"}.get(number % 7)
    try:
        project.vico("run")
        project.forget()
        project.vico("run", "--set", "total.digits=3")
    finally:
        server.fault = lambda number: None
    assert {"503", "stop"} <= set(server.faults)
    assert json.loads(project.vico("audit", "latest", "--json"))["problems"] == []
    stored = project.stored_outputs()
    assert {name: stored[name] for name in undisturbed} == undisturbed


def test_a_store_that_stays_down_is_one_clear_error_and_the_same_command_resumes(
    machine, server, undisturbed
):
    project = machine(VICO_REMOTE_PATIENCE_S="2")
    process, go = project.pause("square:1")
    server.fault_of = lambda method, path: "503"
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE_S)
    (line,) = errors.strip().splitlines()
    assert process.returncode == 1
    assert "square failed: Unreachable: s3://" in line and "the same command again" in line
    project.vico("status", code=1)
    assert "could not be read in" in project.errors
    server.fault_of = lambda method, path: None
    project.vico("run")
    assert project.stored_outputs() == undisturbed


def test_a_store_that_becomes_read_only_during_a_write_is_named(machine, server, undisturbed):
    project = machine()
    process, go = project.pause("square:1")
    server.fault_of = lambda method, path: "403" if method == "PUT" else None
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE_S)
    (line,) = errors.strip().splitlines()
    assert process.returncode == 2
    assert line.startswith("error: square: s3://") and "may not be written" in line
    server.fault_of = lambda method, path: None
    assert not any("square" in key and key.endswith("record.json") for key in project.objects())
    project.vico("run")
    assert project.stored_outputs() == undisturbed


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_a_store_without_conditional_writes_is_refused(machine, server, header):
    project = machine()
    server.dropped_headers = (header,)
    project.vico("run", code=2)
    (line,) = project.errors.splitlines()
    assert line.startswith(f"error: storage={project.address}: the store does not support conditional writes")
    assert project.objects() == {}


@pytest.mark.parametrize(
    "site, storage, message",
    [
        ("", "s3://nowhere/x", "NoSuchBucket"),
        ("", "gs://bucket/x", "is neither a folder nor s3://bucket/prefix"),
        ("", "runs", "has no effect while storage is a folder"),
        ("tracking: {enabled: true}", None, "tracking.uri is not set, and storage=s3://"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(machine, site, storage, message):
    project = machine()
    if site:
        (project.folder / "site.yaml").write_text(f"name: tiny\nwork: {project.folder}/work\n{site}\n")
    if storage:
        project.address = storage
    project.vico("run", code=2)
    (line,) = project.errors.splitlines()
    assert message in line


def test_an_object_swapped_for_one_of_equal_size_is_found_and_rebuilt(machine, undisturbed):
    project = machine()
    project.vico("run")
    key = project.key_of("square", "part-2.txt")
    project.put(key, project.objects()[key][::-1])
    (problem,) = json.loads(project.vico("audit", "latest", "--json", code=1))["problems"]
    assert (problem["stage"], problem["kind"]) == ("square", "output_content")
    assert problem["path"] == f"{project.address}/{key}"
    project.forget()
    project.vico("run", "--set", "total.digits=3", code=2)
    assert f"{key} is not what stage square wrote" in project.errors and "--force square" in project.errors
    project.vico("run", "--force", "square")
    assert json.loads(project.vico("audit", "latest", "--json"))["problems"] == []
    assert project.stored_outputs() == undisturbed


@pytest.mark.slow  # a dozen commands
def test_an_object_that_is_gone_and_a_record_edited_by_hand(machine, undisturbed):
    project = machine()
    project.vico("run")
    key = project.key_of("draw", "part-1.txt")
    project.delete(key)
    (problem,) = json.loads(project.vico("audit", "latest", "--json", code=1))["problems"]
    assert (problem["stage"], problem["kind"]) == ("draw", "output_missing")
    assert project.plan()["draw"] == ("run", ["output/part-1.txt is missing; to be rebuilt"])
    project.vico("run")
    assert project.stored_outputs() == undisturbed
    name = next(k for k in project.objects() if k.startswith("square") and k.endswith("record.json"))
    record = json.loads(project.objects()[name])
    project.put(name, json.dumps({**record, "seconds": 1.0}).encode())
    (problem,) = json.loads(project.vico("audit", "latest", "--json", code=1))["problems"]
    assert (problem["stage"], problem["kind"]) == ("square", "record")
    assert "not the one that was committed" in problem["message"]


@pytest.mark.slow  # a dozen commands
def test_gc_removes_what_no_run_needs_from_the_store(machine):
    project = machine()
    project.vico("run")
    project.vico("run", "--set", "square.power=3")
    project.put(f"parts/draw/{project.stage('draw').name}/{'0' * 64}/part-9.txt", b"of a dead attempt")
    before = project.objects()
    newest = project.runs()[0]
    project.forget()
    would = json.loads(project.vico("gc", "--dry-run", "--drop", newest, "--json"))["removed"]
    assert project.objects() == before
    assert sorted(garbage["kind"] for garbage in would) == ["object", "run", "stage", "stage"]
    assert all(garbage["path"].startswith(project.address) and garbage["bytes"] for garbage in would)
    removed = json.loads(project.vico("gc", "--drop", newest, "--json"))["removed"]
    assert removed == would
    left = project.objects()
    assert len([key for key in left if key.endswith("record.json")]) == 3
    assert not any(newest in key or "0" * 64 in key for key in left)
    assert project.outputs_are_whole()
    assert json.loads(project.vico("gc", "--json"))["removed"] == []


def test_reading_commands_and_reuse_make_few_requests(machine, server):
    project = machine()
    project.vico("run")
    project.vico("run")
    for command, max_requests in (("plan", 15), ("run", 30)):
        before = server.num_requests
        project.vico(command)
        assert server.num_requests - before <= max_requests


@pytest.mark.slow  # MLflow is imported four times
def test_tracking_resumes_on_another_machine_and_has_every_step_once(machine, tmp_path):
    first, second = machine("a"), machine("b")
    for project in (first, second):
        site = (
            (project.folder / "site.yaml")
            .read_text()
            .replace("enabled: false", f"uri: 'sqlite:///{tmp_path}/m.db'")
        )
        (project.folder / "site.yaml").write_text(site)
    first.vico("run", code=-signal.SIGKILL, TINY_KILL="square:2")
    second.vico("run")
    for project in (first, second):
        answer = json.loads(project.vico("audit", "latest", "--json"))
        assert answer["problems"] == []
        assert answer["checked"]["mlflow_runs"] == 4 and answer["checked"]["mlflow_metrics"] >= 9
    assert (tmp_path / "mlartifacts").is_dir()


def test_secrets_stay_in_the_environment(machine):
    project = machine(AWS_SECRET_ACCESS_KEY="planted-secret", AWS_ACCESS_KEY_ID="planted-key")
    project.vico("run")
    planted = [key for key, data in project.objects().items() if b"planted-" in data]
    planted += [
        str(path) for path in project.folder.rglob("*") if path.is_file() and b"planted-" in path.read_bytes()
    ]
    assert planted == []
