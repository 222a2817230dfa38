"""Kills on an object store, and two machines that work on the same run."""

import json
import os
import signal

import pytest

from tests.waiting import PATIENCE_S, wait_until

STAGES = ("draw", "square", "total")
PLACES = ("before", "middle", "unrecorded", "recorded")


def run_and_kill(project, place, stage):
    environment = {"TINY_KILL": f"{stage}:{2 if stage != 'total' else 0}"}
    if place != "middle":
        environment = {"VICO_DIE": f"{place}:{stage}"}
    project.vico("run", code=-signal.SIGKILL, **environment)


@pytest.mark.parametrize(
    "stage", ["square", *(pytest.param(s, marks=pytest.mark.slow) for s in ("draw", "total"))]
)
def test_after_a_kill_at_any_place_another_machine_resumes(machine, undisturbed, stage):
    """One run is killed at each place in turn; each time the other of two machines resumes it."""
    machines = [machine("a"), machine("b")]
    for number, place in enumerate(PLACES):
        run_and_kill(machines[number % 2], place, stage)
        assert machines[0].status()["state"] == "interrupted"
    machines[0].vico("run")
    assert len(machines[0].runs()) == 1
    assert machines[0].stored_outputs() == undisturbed
    machines[1].vico("run")
    status = machines[1].status()
    assert status["state"] == "done" and all(entry["reused"] for entry in status["stages"])
    assert json.loads(machines[1].vico("audit", "latest", "--json"))["problems"] == []


def test_parts_of_a_dead_attempt_count_if_they_reached_the_store(machine, undisturbed):
    first, second = machine("a"), machine("b")
    process, _ = first.pause("square:2")
    wait_until(lambda: any(k.startswith("parts/square") for k in first.objects()), process)
    wait_until(lambda: len(json.loads(square_parts(first))["parts"]) == 2, process)
    assert second.status()["state"] == "running", "as seen from another machine"
    process.kill()
    process.wait()
    keys = {key for key in first.objects() if key.startswith("parts/square")}
    output = second.vico("run")
    assert "square: starts, attempt 2 (unfinished: resumes from attempt 1)" in output
    assert second.stored_outputs() == undisturbed
    assert keys < set(second.objects()), "parts in the store were not made again"
    metrics = second.stage("square") / "attempts" / "2" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 2, "two parts were left to make"


def square_parts(project):
    return next(v for k, v in project.objects().items() if k.startswith("square") and "parts.json" in k)


def test_another_machine_reuses_results_that_it_has_never_read(machine, undisturbed):
    first, second = machine("a"), machine("b")
    first.vico("run")
    plan = second.plan()
    assert {action for action, _ in plan.values()} == {"reuse"}
    assert second.status()["run"] == first.status()["run"]
    assert "total: done in" in second.vico("logs", "latest")
    assert second.outputs() == {}, "planning and reading need no bytes of parts"
    second.vico("run", "--set", "total.digits=3")
    fetched = {name.split("/")[0] for name in second.outputs()}
    assert fetched == set(STAGES), "the inputs of total were fetched"
    differences = json.loads(second.vico("diff", *second.runs(), "--json"))["config"]
    assert "total.digits" in [difference["name"] for difference in differences]
    (second.stage("square") / "output" / "part-1.txt").write_text("only here")
    second.vico("run", "--set", "total.digits=4")
    name = f"square/{second.stage('square').name}/output/part-1.txt"
    assert second.outputs()[name] == undisturbed[name], (
        "a copy with other bytes than in the store is replaced"
    )


def test_two_machines_at_once_are_one_writer(machine, undisturbed):
    first, second = machine("a"), machine("b")
    drivers = [
        project.start("run", "--wait", f"{PATIENCE_S:.0f}") for project in (first, second, first, second)
    ]
    for driver in drivers:
        output, errors = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 0, (output, errors)
    assert len(first.runs()) == 1
    assert len(first.status()["attempts"]) == 1
    assert first.stored_outputs() == undisturbed
    begun = [key for key in first.objects() if key.endswith("attempt.json")]
    assert len(begun) == 3, "each stage was begun once"


def test_a_second_machine_names_the_holder_of_the_run(machine):
    first, second = machine("a"), machine("b")
    process, go = first.pause("draw:1")
    second.vico("run", code=1)
    assert f"held by run {first.status()['run']}" in second.errors and "s3://" in second.errors
    go.touch()
    assert process.wait(timeout=PATIENCE_S) == 0


@pytest.mark.slow  # the counter is watched for 30 s, twice
def test_a_driver_whose_lease_another_machine_took_over_publishes_nothing_more(machine, undisturbed):
    first, second = machine("a"), machine("b")
    process, go = first.pause("square:1")
    os.kill(process.pid, signal.SIGSTOP)
    for key, data in first.objects().items():
        if key.endswith("lease.json"):  # as seen from another host: only the counter shows life
            first.put(key, json.dumps({**json.loads(data), "host": "elsewhere"}).encode())
    second.vico_slowly("run")
    os.kill(process.pid, signal.SIGCONT)
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "taken over" in errors or "no longer" in errors or "another driver" in errors
    assert second.status()["state"] == "done"
    assert second.stored_outputs() == undisturbed
    assert json.loads(second.vico("audit", "latest", "--json"))["problems"] == []
