"""What gc removes and what it never touches: real commands over tiny stages."""

import fcntl
import itertools
import json
import os
import shutil
import threading

import pytest

from pipeline.json_files import write_json
from pipeline.results import garbage
from pipeline.results.garbage import collect_garbage
from pipeline.storage.leases import LeaseHeld
from stages import durable_files
from tests.integration.tiny_pipeline.project import TinyProject
from tests.waiting import PATIENCE_S


@pytest.fixture
def project(tmp_path):
    project = TinyProject(tmp_path / "project")
    yield project
    project.close()


def gc(project, *arguments):
    """Return kind -> paths below the storage."""
    answer = json.loads(project.vico("gc", "--json", *arguments))
    paths = {}
    for removed in answer["removed"]:
        paths.setdefault(removed["kind"], []).append(os.path.relpath(removed["path"], project.storage))
        assert os.path.exists(removed["path"]) == answer["dry_run"]
    return paths


def test_what_runs_need_stays(project):
    project.vico("run")
    project.vico("run", "--set", "square.power=3")
    project.vico("run", "--force", "square")
    before = project.kept()
    assert gc(project) == {}
    assert project.kept() == before
    for run in project.runs():
        assert json.loads(project.vico("audit", run, "--json"))["problems"] == []


def test_a_dropped_run_goes_with_what_it_alone_needs(project):
    project.vico("run")
    first = project.runs()[0]
    before = project.kept()
    project.vico("run", "--set", "square.power=3")
    second = project.runs()[0]
    listed = gc(project, "--dry-run", "--drop", second)
    assert listed["run"] == [f"runs/{second}"]
    assert sorted(path.partition("/")[0] for path in listed["stage"]) == ["square", "total"]
    assert gc(project, "--drop", second) == listed
    assert project.kept() == before
    assert project.runs() == [first]
    assert json.loads(project.vico("audit", first, "--json"))["ok"]
    assert {action for action, _ in project.plan().values()} == {"reuse"}


def test_leftovers_go_and_outputs_stay(project):
    project.vico("run", code=-9, TINY_KILL="square:2")
    (partial,) = project.half_written()
    shutil.copytree(project.stage("draw") / "output", project.stage("draw") / "superseded" / "1" / "output")
    (project.storage / "runs" / "20200101-000000-dead").mkdir()
    notes = project.storage / "notes" / "mine.txt"
    notes.parent.mkdir()
    notes.write_text("not a file of vico")
    before = project.outputs()
    assert "partial" in project.vico("gc", "--dry-run")
    removed = gc(project)
    assert set(removed) == {"run", "superseded", "partial"}
    assert removed["partial"] == [str(partial.relative_to(project.storage))]
    assert project.outputs() == before and notes.exists()
    project.vico("run")
    assert gc(project) == {}


def test_a_superseded_record_is_needed_by_its_run(project):
    project.vico("run")
    project.vico("run", "--force", "total")
    superseded = project.stage("total") / "superseded" / "1"
    first = project.runs()[1]
    assert gc(project) == {} and superseded.exists()
    assert gc(project, "--drop", first)["superseded"] == [str(superseded.relative_to(project.storage))]
    assert json.loads(project.vico("audit", "latest", "--json"))["ok"]


def test_nothing_is_removed_while_a_driver_works(project):
    process, go = project.pause("square:1")
    before = project.half_written()
    for option in ([], ["--dry-run"]):
        project.vico("gc", *option, code=1)
        assert f"pid {process.pid}" in project.errors
    assert before and project.half_written() == before
    go.touch()
    assert process.wait(timeout=PATIENCE_S) == 0


def test_a_driver_whose_machine_is_gone_is_watched_and_then_ignored(project):
    """Its process cannot be seen any more, so its counter decides."""
    project.vico("run")
    before = gc(project, "--dry-run")
    (path,) = project.storage.glob("runs/*/lease.json")
    holder = {**json.loads(path.read_text()), "released": False, "boot_id": "the one before"}
    path.write_text(json.dumps(holder))
    stop = threading.Event()

    def beat():
        for counter in itertools.count(holder["counter"] + 1):
            write_json(path, {**holder, "counter": counter})
            if stop.wait(0.2):
                return

    alive = threading.Thread(target=beat)
    alive.start()
    try:
        with pytest.raises(LeaseHeld, match="stop it, or try again when it has ended"):
            collect_garbage(project.storage, dry_run=True, stale_s=2.0)
    finally:
        stop.set()
        alive.join()
    assert len(collect_garbage(project.storage, dry_run=False, stale_s=2.0)) == len(before)
    now = json.loads(path.read_text())
    assert now["released"] and now["token"] != holder["token"], "if it wakes up, it has lost its lease"


def test_nothing_is_deleted_under_the_lock_that_other_commands_wait_for(project, monkeypatch):
    project.vico("run")
    project.vico("run", "--set", "square.power=3")
    left = project.storage / ".gc-1-dead"
    left.mkdir()
    deleted = []

    def delete(path, root):
        with (project.storage / "runs" / "lease.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError if gc holds it
        deleted.append(path)
        durable_files.delete(path, root)

    monkeypatch.setattr(garbage, "delete", delete)
    collect_garbage(project.storage, [project.runs()[0]], dry_run=False)
    assert len(deleted) == 2 and left in deleted
    assert not list(project.storage.glob(".gc-*"))


def test_on_a_full_disk_things_are_removed_in_place(project, monkeypatch):
    project.vico("run")
    first = project.runs()[0]
    project.vico("run", "--set", "square.power=3")
    before = project.kept()
    (project.storage / ".gc-1-dead").mkdir()
    monkeypatch.setattr(garbage, "_new_trash", lambda storage: None)
    removed = collect_garbage(project.storage, [project.runs()[0]], dry_run=False)
    assert sorted(each.kind for each in removed) == ["run", "stage", "stage", "trash"]
    assert not any(each.path.exists() for each in removed) and len(project.kept()) < len(before)
    assert json.loads(project.vico("audit", first, "--json"))["ok"]


def test_a_run_that_cannot_be_read_stops_gc(project):
    project.vico("run")
    (path,) = project.storage.glob("runs/*/run.json")
    path.write_text("{")
    before = project.kept()
    project.vico("gc", code=2)
    assert str(path) in project.errors
    assert set(project.kept()) - set(before) <= {project.storage / "runs" / "lease.lock"}
