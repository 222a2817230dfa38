"""A graph with two branches: both run at once, and end correctly when one fails, is held or is stopped."""

import json
import signal

import pytest

from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import PATIENCE_S, wait_until

STAGES = ("draw", "square", "cube", "both")
BOTH = "square:1,cube:1"


@pytest.fixture
def project(tmp_path, monkeypatch, terminal_signals):
    monkeypatch.setenv("TINY_FORK", "1")
    project = TinyProject(tmp_path / "project")
    yield project
    project.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    project = TinyProject(tmp_path_factory.mktemp("undisturbed"))
    project.vico("run", TINY_FORK="1")
    return project.outputs()


def states(project):
    return {stage["name"]: stage["state"] for stage in project.status()["stages"]}


def test_a_branch_does_not_wait_for_the_other(project, undisturbed):
    process, go = project.pause("square:1")
    wait_until(lambda: list(project.storage.glob("cube/*/record.json")), process)
    assert not list(project.storage.glob("square/*/record.json"))
    assert states(project)["square"] == "running" and states(project)["both"] == "pending"
    go.touch()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert output.splitlines()[-1].endswith(": done")
    assert project.outputs() == undisturbed
    for name, other in (("square", "cube"), ("cube", "square")):
        log = (project.stage(name) / "attempts/1/driver.log").read_text()
        assert f"{name}: starts" in log and f"{other}: " not in log
    assert "both: reused" in project.vico("run")


def test_when_a_branch_fails_the_other_finishes_and_nothing_new_begins(project, undisturbed):
    process, go = project.pause("square:1", TINY_FAIL="cube:1")
    wait_until(lambda: states(project)["cube"] == "failed", process)
    assert project.status()["state"] == "running" and states(project)["square"] == "running"
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("error: cube failed: RuntimeError: and its last line; see ")
    assert project.status()["state"] == "failed"
    assert states(project) == {"draw": "done", "square": "done", "cube": "failed", "both": "pending"}
    project.vico("run")
    assert project.outputs() == undisturbed
    assert project.record("square")["attempt"] == 1, "the result of the other branch was kept"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_both_branches(project, undisturbed, number, code):
    process, _ = project.pause(BOTH)
    wait_until(lambda: list(states(project).values()).count("running") == 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, errors
    assert "stopped by" in errors and "Traceback" not in errors
    (path,) = project.storage.glob("runs/*/run.json")
    stored = {name: entry["state"] for name, entry in json.loads(path.read_text())["stages"].items()}
    assert stored == {"draw": "done", "square": "interrupted", "cube": "interrupted", "both": "pending"}
    for stage in ("square", "cube"):
        assert json.loads((project.stage(stage) / "lease.json").read_text())["released"]
    project.vico("run")
    assert project.outputs() == undisturbed


def test_after_a_kill_in_both_branches_the_same_command_resumes(project, undisturbed):
    process, _ = project.pause(BOTH)
    wait_until(lambda: list(states(project).values()).count("running") == 2, process)
    process.kill()
    process.wait()
    assert states(project) == {
        "draw": "done",
        "square": "interrupted",
        "cube": "interrupted",
        "both": "pending",
    }
    project.vico("run")
    assert project.outputs() == undisturbed
    assert project.half_written() == []


def test_a_branch_that_another_driver_holds_does_not_stop_the_other(project):
    process, go = project.pause("square:1")
    project.vico("run", "--set", "cube.power=4", code=1)
    assert "is held by run" in project.errors and f"pid {process.pid}," in project.errors
    assert project.status()["state"] == "interrupted"
    assert states(project) == {"draw": "done", "square": "pending", "cube": "done", "both": "pending"}
    go.touch()
    assert process.wait(timeout=PATIENCE_S) == 0
