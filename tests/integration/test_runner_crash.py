"""Real drivers that are killed, stopped or compete: nothing is lost, redone or written twice."""

import json
import os
import random
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import PATIENCE_S, wait_until

STAGES = ("draw", "square", "total")


@pytest.fixture
def project(tmp_path):
    project = TinyProject(tmp_path / "project")
    yield project
    project.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outputs of a run without kills."""
    project = TinyProject(tmp_path_factory.mktemp("undisturbed"))
    project.vico("run")
    return project.outputs()


def kills() -> list[Any]:
    """(stage, place) of every kill. Those of one stage, and one in the middle of each, are not slow."""
    places = ["before", "middle", "unrecorded", "recorded"]
    return [
        (stage, place)
        if stage == "square" or place == "middle"
        else pytest.param(stage, place, marks=pytest.mark.slow)
        for stage in STAGES
        for place in places
    ]


@pytest.mark.parametrize("stage, place", kills())
def test_the_same_command_after_a_kill_gives_what_an_undisturbed_run_gives(
    project, undisturbed, stage, place
):
    number = 0 if stage == "total" else 2
    planted = {"TINY_KILL": f"{stage}:{number}"} if place == "middle" else {"VICO_DIE": f"{place}:{stage}"}
    project.vico("run", code=-signal.SIGKILL, **planted)
    (run,) = project.runs()
    killed = project.status()
    assert killed["state"] == "interrupted"
    assert "running" not in {entry["state"] for entry in killed["stages"]}
    assert (project.storage / stage).exists() == (place != "before")

    output = project.vico("run", "--json")
    assert json.loads(output.splitlines()[-1]) == {
        "run": run,
        "state": "done",
        "storage": str(project.storage),
    }
    assert project.runs() == [run]
    after = project.status()
    assert after["state"] == "done"
    assert [attempt["state"] for attempt in after["attempts"]] == ["interrupted", "done"]
    entry = next(entry for entry in after["stages"] if entry["name"] == stage)
    assert entry["reused"] == (place == "recorded")
    assert entry["attempt"] == (2 if place in ("middle", "unrecorded") else 1)
    assert project.outputs() == undisturbed
    assert project.half_written() == []


def test_parts_published_before_a_kill_are_not_written_again(project):
    project.vico("run", code=-signal.SIGKILL, TINY_KILL="draw:2")
    parts = sorted((project.stage("draw") / "output").glob("part-*"))
    assert [path.name for path in parts] == ["part-0.txt", "part-1.txt"]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts}
    assert project.plan()["draw"] == ("run", ["unfinished: resumes from attempt 1"])
    project.vico("run")
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts} == before


def test_a_finished_run_is_returned_and_nothing_is_created(project):
    project.vico("run")
    first, before = project.status(), project.kept()
    output = project.vico("run", "--json")
    assert json.loads(output)["run"] == first["run"]
    again = project.status()
    assert all(entry["reused"] and entry["reused_from"] == first["run"] for entry in again["stages"])
    assert again["attempts"] == first["attempts"]
    assert project.kept() == before


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_a_true_state_and_the_same_command_resumes(project, undisturbed, number, code):
    process, _ = project.pause("square:1")
    running = project.status()
    assert running["state"] == "running"
    assert [entry["state"] for entry in running["stages"]] == ["done", "running", "pending"]
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert "stopped by" in errors and "Traceback" not in output + errors
    stored = json.loads((project.storage / "runs" / running["run"] / "run.json").read_text())
    assert stored["state"] == "interrupted"
    assert [entry["state"] for entry in stored["stages"].values()] == ["done", "interrupted", "pending"]
    project.vico("run")
    assert project.outputs() == undisturbed


def test_a_stage_that_fails_says_so_in_one_line_and_resumes_when_it_is_fixed(project, undisturbed):
    project.vico("run", code=1, TINY_FAIL="square:1")
    (line,) = project.errors.splitlines()
    log = project.stage("square") / "attempts" / "1" / "driver.log"
    assert line == f"error: square failed: RuntimeError: and its last line; see {log}"
    assert "Traceback" in log.read_text() and "planted in square:1" in log.read_text()
    failed = project.status()
    assert failed["state"] == "failed" and failed["error"] in line
    assert [entry["state"] for entry in failed["stages"]] == ["done", "failed", "pending"]
    project.vico("run")
    assert project.status()["run"] == failed["run"]
    assert project.outputs() == undisturbed


def test_a_second_driver_names_the_holder_of_the_run_and_writes_nothing(project):
    process, go = project.pause("draw:1")
    run = project.status()["run"]
    output = project.vico("run", "--json", code=1)
    assert json.loads(output.splitlines()[-1])["state"] == "running"
    assert f"held by run {run}" in project.errors and f"pid {process.pid}," in project.errors
    go.touch()
    assert process.wait(timeout=PATIENCE_S) == 0
    assert project.runs() == [run]
    assert len(project.status()["attempts"]) == 1


def test_a_second_driver_that_waits_finds_the_work_done(project, undisturbed):
    process, go = project.pause("draw:1")
    second = project.start("run", "--wait", f"{PATIENCE_S:.0f}")
    # it prints which run it waits for
    wait_until(lambda: second.stdout.readline().startswith("run "), second)
    go.touch()
    assert process.wait(timeout=PATIENCE_S) == 0
    output, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0
    assert "total: reused" in output
    assert len(project.runs()) == 1
    assert len(project.status()["attempts"]) == 1
    assert project.outputs() == undisturbed


def test_two_pipelines_that_share_a_stage_have_one_writer_of_it(project):
    process, go = project.pause("draw:1")
    project.vico("run", "--set", "square.power=3", code=1)
    assert "is held by run" in project.errors and f"pid {process.pid}," in project.errors
    assert project.status()["state"] == "interrupted"
    waiting = project.start("run", "--set", "square.power=3", "--wait", f"{PATIENCE_S:.0f}")
    wait_until(lambda: waiting.stdout.readline().startswith("draw: waiting"), waiting)
    go.touch()
    assert process.wait(timeout=PATIENCE_S) == 0
    assert waiting.wait(timeout=PATIENCE_S) == 0
    ours, theirs = project.runs()
    draw = project.status(ours)["stages"][0]
    assert draw["reused"] and draw["reused_from"] == theirs
    assert project.record("draw")["attempt"] == 1


def test_drivers_started_at_once_make_one_run(project, undisturbed):
    for _ in range(4):
        drivers = [project.start("run", "--wait", f"{PATIENCE_S:.0f}") for _ in range(3)]
        assert [driver.wait(timeout=PATIENCE_S) for driver in drivers] == [0, 0, 0]
        assert len(project.runs()) == 1
        assert len(project.status()["attempts"]) == 1
        assert project.outputs() == undisturbed
        subprocess.run(["rm", "-r", str(project.storage)], check=True)


@pytest.mark.slow  # forty processes
def test_two_drivers_at_once_are_one_writer_in_twenty_rounds(project, undisturbed):
    """One writes; the other waits, or names the holder of the run, or comes late and finds the work done.
    In every second round one of them is killed at a random time, and the same command resumes."""
    moments, refused = random.Random(0), 0
    for number in range(20):
        waiting = ["--wait", f"{PATIENCE_S:.0f}"] if number % 4 < 2 else []
        drivers = [project.start("run", *waiting) for _ in range(2)]
        if number % 2:
            time.sleep(0.5 + moments.random())
            drivers[0].kill()
        ends = []
        for driver in drivers:
            output, errors = driver.communicate(timeout=PATIENCE_S)
            assert "Traceback" not in output + errors
            assert driver.returncode in (0, -signal.SIGKILL) or "is held by run" in errors, errors
            ends.append(driver.returncode)
        refused += ends.count(1)
        if -signal.SIGKILL in ends or 0 not in ends:
            project.vico("run")
        assert len(project.runs()) == 1
        assert project.status()["state"] == "done"
        assert project.outputs() == undisturbed
        assert project.half_written() == []
        for stage in STAGES:
            begun = {path.name for path in project.stage(stage).glob("attempts/*")}
            assert len(begun) <= (2 if number % 2 else 1), "a stage was begun by two drivers"
        subprocess.run(["rm", "-r", str(project.storage)], check=True)
    assert refused, "no round had a driver that found the run held"


@pytest.mark.slow  # the counter is watched for 30 s, twice
def test_a_driver_that_lost_its_lease_publishes_nothing_more(project, undisturbed):
    """A driver is stopped (like a machine that hangs), its lease is taken over, then it continues."""
    process, go = project.pause("square:1")
    os.kill(process.pid, signal.SIGSTOP)
    for folder in (project.storage / "runs" / project.status()["run"], project.stage("square")):
        path = folder / "lease.json"
        lease = json.loads(path.read_text())
        lease["host"] = "elsewhere"  # as seen from another machine: only the counter shows life
        path.write_text(json.dumps(lease))
    second = project.start("run", PYTHONUNBUFFERED="1")
    assert second.wait(timeout=PATIENCE_S) == 0
    os.kill(process.pid, signal.SIGCONT)
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "taken over" in errors or "no longer" in errors
    assert project.status()["state"] == "done"
    assert project.outputs() == undisturbed
