"""Publishing, renaming and removing the parts of a stage."""

import json
import pickle
import threading
import time

import pytest

from pipeline.storage.output_files import is_partial
from stages.durable_files import delete, locked
from stages.parts import JOURNAL_FILE, Parts
from stages.stops import LeaseLost


def write_lease(parts, attempt, released=False):
    parts.folder.mkdir(parents=True, exist_ok=True)
    lease = {"attempt": attempt, "released": released, "host": "h", "pid": 1}
    (parts.folder / "lease.json").write_text(json.dumps(lease))


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "stage" / "fingerprint", attempt=3)


def test_a_part_does_not_exist_until_it_is_published(parts):
    partial = parts.partial("a/00000.tar")
    assert partial.name == ".00000.tar.partial-3" and partial.parent == parts.output / "a"
    partial.write_bytes(b"half")
    assert not parts.done("a/00000.tar")
    assert parts.publish("a/00000.tar") == parts.output / "a" / "00000.tar"
    assert parts.done("a/00000.tar") and not partial.exists()


def test_a_folder_is_one_part(parts):
    folder = parts.partial("checkpoints/step-1")
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "rank-0").write_text("state")
    parts.publish("checkpoints/step-1")
    assert (parts.output / "checkpoints/step-1/inner/rank-0").read_text() == "state"


def test_a_part_is_never_rewritten(parts):
    parts.partial("x").write_text("first")
    parts.publish("x")
    parts.partial("x").write_text("second")
    with pytest.raises(FileExistsError, match="published already"):
        parts.publish("x")
    assert (parts.output / "x").read_text() == "first"


def test_a_summary_is_replaced_as_a_whole(parts):
    parts.write_json("metrics.json", {"a": 1})
    parts.write_json("metrics.json", {"a": 2})
    assert json.loads((parts.output / "metrics.json").read_text()) == {"a": 2}
    with pytest.raises(ValueError):
        parts.write_json("metrics.json", {"a": float("nan")})
    assert json.loads((parts.output / "metrics.json").read_text()) == {"a": 2}


@pytest.mark.parametrize("attempt, released", [(4, False), (2, False), (3, True)])
def test_an_attempt_that_lost_the_lease_publishes_nothing(parts, attempt, released):
    write_lease(parts, attempt, released)
    parts.partial("x").write_text("late")
    with pytest.raises(LeaseLost, match=f"last owner is attempt {attempt}"):
        parts.publish("x")
    with pytest.raises(LeaseLost):
        parts.write_json("summary.json", {})
    assert not parts.done("x") and not parts.done("summary.json")


def test_the_owner_of_the_lease_can_publish_from_another_process(parts):
    write_lease(parts, 3)
    copy = pickle.loads(pickle.dumps(parts))
    copy.partial("x").write_text("mine")
    copy.publish("x")
    assert parts.done("x")


def test_the_journal_lists_in_order_what_was_published_renamed_and_removed(tmp_path):
    parts = Parts(tmp_path, 1)
    for name in ("waiting/0.tar", "waiting/1.tar", "table.json"):
        parts.partial(name).write_text(name)
        parts.publish(name)
    parts.rename({"waiting/0.tar": "0.tar"})
    assert (parts.output / "0.tar").read_text() == "waiting/0.tar"
    parts.remove("waiting")
    parts.remove("never there")
    assert not (parts.output / "waiting").exists()
    lines = (parts.attempt_folder / JOURNAL_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"published": "waiting/0.tar"},
        {"published": "waiting/1.tar"},
        {"published": "table.json"},
        {"published": "0.tar"},
        {"removed": "waiting/0.tar"},
        {"removed": "waiting"},
    ]
    with pytest.raises(FileExistsError, match=r"0\.tar is published already"):
        parts.rename({"table.json": "0.tar"})


def test_parts_that_are_published_together_keep_their_order(tmp_path):
    parts = Parts(tmp_path, 1)
    for name in ("sidecars/0", "sidecars/0.tar", "other"):
        parts.partial(name).write_text(name)
    parts.publish("sidecars/0", "sidecars/0.tar")
    lines = (parts.attempt_folder / JOURNAL_FILE).read_text().splitlines()
    assert [json.loads(line)["published"] for line in lines] == ["sidecars/0", "sidecars/0.tar"]
    with pytest.raises(FileExistsError, match=r"sidecars/0 is published already"):
        parts.partial("sidecars/0").write_text("again")
        parts.publish("other", "sidecars/0")
    assert parts.done("other") and (parts.output / "sidecars/0").read_text() == "sidecars/0"


def test_an_attempt_that_was_taken_over_removes_and_renames_nothing(tmp_path):
    parts = Parts(tmp_path, 1)
    parts.partial("a.txt").write_text("a")
    parts.publish("a.txt")
    write_lease(parts, attempt=2)
    with pytest.raises(LeaseLost):
        parts.remove("a.txt")
    with pytest.raises(LeaseLost):
        parts.rename({"a.txt": "b.txt"})
    assert (parts.output / "a.txt").read_text() == "a"


def test_a_kill_during_deletion_leaves_no_half_part(tmp_path, monkeypatch):
    parts = Parts(tmp_path, 1)
    (parts.partial("best/step-30") / "inner").mkdir(parents=True)
    parts.publish("best/step-30")

    def killed(path, ignore_errors, dir_fd):
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.durable_files.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        parts.remove("best/step-30")
    assert not parts.done("best/step-30") and not list(parts.output.glob("best/step-*"))
    (left,) = parts.output.glob("best/.*")
    assert is_partial(left.name), "the next attempt deletes it"


def test_a_part_that_disappears_while_remove_waits_for_the_lock_is_not_an_error(parts):
    """The driver deletes a checkpoint whose upload is complete; a rank removes the same one."""
    part = parts.output / "checkpoints/step-1"
    part.mkdir(parents=True)
    errors = []

    def remove():
        try:
            parts.remove("checkpoints/step-1")
        except OSError as error:
            errors.append(error)

    removal = threading.Thread(target=remove)
    with locked(parts.folder):
        removal.start()
        time.sleep(0.2)  # by now it has seen the part and waits
        parts.hide(part)
    removal.join()
    assert errors == []


def test_a_folder_and_a_folder_in_it_can_be_deleted_at_the_same_time(tmp_path):
    for number in range(20):
        inner = tmp_path / f"{number}/checkpoints/.step-1.partial-1"
        inner.mkdir(parents=True)
        for name in range(100):
            (inner / str(name)).touch()
        barrier = threading.Barrier(2)
        errors = []

        def delete_with_other(path, barrier=barrier, errors=errors):
            barrier.wait()
            try:
                delete(path, tmp_path)
            except OSError as error:
                errors.append(error)

        paths = (inner, inner.parent)
        threads = [threading.Thread(target=delete_with_other, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        delete(inner.parent, tmp_path)
        assert errors == [] and not inner.parent.exists()
