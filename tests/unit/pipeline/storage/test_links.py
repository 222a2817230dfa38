"""Links planted at every level of a storage: no command writes, moves or deletes what they lead to."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline.results.garbage import collect_garbage
from pipeline.results.records import RECORD_FILE
from pipeline.results.runs import Runs
from pipeline.results.stage_folder import Damage, StageFolder
from pipeline.storage.folder import FolderStorage
from pipeline.storage.leases import Leases
from pipeline.storage.output_files import move_to_superseded, remove_partials
from stages import durable_files
from stages.parts import Parts
from vico import own_files
from vico.errors import UserError
from vico.own_files import is_inside

FINGERPRINT, OTHER_FINGERPRINT = "a" * 64, "b" * 64


def tree(folder: Path) -> dict[str, str]:
    """Return path -> digest of all files, and of what links lead to."""
    return {
        path.relative_to(folder).as_posix(): "folder"
        if path.is_dir() and not path.is_symlink()
        else os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def other(tmp_path) -> Path:
    """Somebody else's storage, with a result, its attempt, half-written parts and superseded results."""
    other = tmp_path / "other"
    for fingerprint in (FINGERPRINT, OTHER_FINGERPRINT):
        folder = other / "shard" / fingerprint
        for name in (
            RECORD_FILE,
            "output/00000.tar",
            "output/.00001.tar.partial-1",
            "output/checkpoints/.step-0000001.partial-1/x",
            "attempts/1/metrics.jsonl",
            "attempts/1/universal/step-0000001/state/x.pt",
            "superseded/1/record.json",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"their {name}")
    (other / "runs/20260101-000000-abcd").mkdir(parents=True)
    (other / "runs/20260101-000000-abcd/run.log").write_text("theirs")
    return other


def begin(storage: Path, attempt: int = 1) -> Parts:
    """Begin an attempt as `vico run` does; afterwards nobody has the lease."""
    folder = StageFolder(storage, "shard", FINGERPRINT)
    lease = Leases(FolderStorage()).acquire(folder.path, "run", min_attempt=attempt)
    try:
        return folder.begin(lease, {}, [], "now")
    finally:
        lease.release()
        (folder.path / "lease.json").unlink(missing_ok=True)


PLANTED = [
    "shard",
    f"shard/{FINGERPRINT}",
    *(f"shard/{FINGERPRINT}/{name}" for name in ("output", "attempts")),
]


@pytest.mark.parametrize("link", PLANTED)
def test_an_attempt_does_not_begin_behind_a_link(tmp_path, other, link):
    storage, before = tmp_path / "storage", tree(other)
    (storage / link).parent.mkdir(parents=True)
    (storage / link).symlink_to(other / link)
    with pytest.raises(UserError, match=rf"{link} is a link to .*, out of .*remove the link"):
        begin(storage)
    assert tree(other) == before


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-0000001"])
@pytest.mark.parametrize("act", ["partial", "publish", "remove", "rename"])
def test_a_part_is_not_written_moved_or_removed_behind_a_link(tmp_path, other, name, act):
    parts = begin(tmp_path / "storage")
    target = other / "checkpoints"
    (target / "inner").mkdir(parents=True)
    (parts.output / name).parent.mkdir(exist_ok=True)
    if act in ("publish", "rename"):  # the link is planted after the part was written
        partial = parts.partial(f"{name}/inner/new")
        partial.write_text("ours")
        if act == "rename":
            (parts.output / "old").write_text("ours")
        shutil.rmtree(parts.output / name)
    (target / "inner/.new.partial-1").write_text("theirs")
    before = tree(other)
    (parts.output / name).symlink_to(target)
    actions: dict[str, Callable[[], object]] = {
        "partial": lambda: parts.partial(f"{name}/inner/new"),
        "publish": lambda: parts.publish(f"{name}/inner/new"),
        "remove": lambda: parts.remove(f"{name}/inner"),
        "rename": lambda: parts.rename({"old": f"{name}/inner/new"}),
    }
    with pytest.raises(UserError, match=r"is a link to .*out of"):
        actions[act]()
    assert tree(other) == before
    parts.remove(name)
    assert not os.path.lexists(parts.output / name) and tree(other) == before, "the link itself is removed"


def test_links_with_the_names_of_files_that_are_written_are_not_followed(tmp_path, other):
    """A partial file, the journal, the lock and the temporary file of a JSON file."""
    parts, victim = begin(tmp_path / "storage"), other / "victim"
    victim.write_text("theirs")
    (parts.output / ".00000.tar.partial-1").symlink_to(victim)
    parts.partial("00000.tar").write_text("ours")
    parts.publish("00000.tar")
    assert (parts.output / "00000.tar").read_text() == "ours"
    for path in (parts.folder / "lease.lock", parts.attempt_folder / "parts.journal"):
        path.unlink()
        path.symlink_to(victim)
        parts.partial("00001.tar").write_text("ours")
        with pytest.raises(UserError, match=rf"{path.name} is a link, and nothing is written through"):
            parts.publish("00001.tar")
        path.unlink()
        (parts.output / "00001.tar").unlink(missing_ok=True)
    assert victim.read_text() == "theirs"


def test_a_next_attempt_removes_half_written_links_and_not_what_they_lead_to(tmp_path, other):
    storage, before = tmp_path / "storage", tree(other)
    parts = begin(storage)
    theirs = other / "shard" / FINGERPRINT
    (parts.output / ".x.partial-1").symlink_to(theirs / "output")
    (parts.output / ".y.partial-1").symlink_to(tmp_path / "nowhere")
    begin(storage, attempt=2)
    assert tree(parts.output) == {} and tree(other) == before


def test_what_a_training_cleans_up_is_not_behind_links(tmp_path, other):
    from stages.training.checkpoints import remove_checkpoints, remove_half_deleted
    from stages.training.universal import remove_conversions

    parts, before = begin(tmp_path / "storage"), tree(other)
    theirs = other / "shard" / FINGERPRINT
    (parts.folder / "attempts/7").symlink_to(theirs / "attempts/1")
    (parts.attempt_folder / "universal").symlink_to(theirs / "attempts/1/universal")
    (parts.output / "checkpoints").symlink_to(theirs / "output/checkpoints")
    remove_half_deleted(parts)
    remove_conversions(parts)
    remove_checkpoints(parts)
    assert tree(other) == before
    assert not os.path.lexists(parts.attempt_folder / "universal")


@pytest.mark.parametrize("link", ["output", "attempts", RECORD_FILE, "superseded", "output/00000.tar"])
def test_a_replaced_result_moves_links_as_links(tmp_path, other, link):
    storage, before = tmp_path / "storage", tree(other)
    parts = begin(storage)
    folder = StageFolder(storage, "shard", FINGERPRINT)
    lease = Leases(FolderStorage()).acquire(folder.path, "run")
    try:
        if (folder.path / link).is_dir():
            shutil.rmtree(folder.path / link)
        (folder.path / link).symlink_to(other / "shard" / FINGERPRINT / link)
        if link == "superseded":
            with pytest.raises(UserError, match="superseded is a link"):
                folder.supersede(lease)
        elif link.startswith("output/"):
            superseded = folder.supersede_record(lease, Damage(("00000.tar",), ()))
            assert (superseded / link).is_symlink()
        else:
            superseded = folder.supersede(lease)
            assert superseded is not None and (superseded / link).is_symlink()
    finally:
        lease.release()
    assert tree(other) == before and parts.folder.is_dir()


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    "link", ["shard", f"shard/{FINGERPRINT}", ".gc-x", "runs/20260101-000000-abcd", "router", "other-name"]
)
def test_gc_touches_nothing_behind_a_link(tmp_path, other, link, dry_run):
    storage = tmp_path / "storage"
    (storage / "ratio" / OTHER_FINGERPRINT / "output").mkdir(parents=True)
    (storage / link).parent.mkdir(parents=True, exist_ok=True)
    target = {".gc-x": other, "router": other / "shard", "other-name": other / "shard"}.get(
        link, other / link
    )
    (storage / link).symlink_to(target)
    before = tree(other)
    garbage = collect_garbage(storage, dry_run=dry_run)
    assert tree(other) == before
    assert storage / "ratio" / OTHER_FINGERPRINT in [entry.path for entry in garbage]
    if not dry_run:
        assert not (storage / "ratio" / OTHER_FINGERPRINT).exists() and not list(storage.glob(".gc-*"))
        is_named_by_gc = link not in ("shard", "router", "other-name")
        assert os.path.lexists(storage / link) != is_named_by_gc, "a link among the garbage is removed itself"


@pytest.mark.parametrize("link", ["output", "superseded"])
def test_gc_touches_nothing_behind_a_link_in_a_folder_that_is_needed(tmp_path, other, link):
    storage = tmp_path / "storage"
    parts = begin(storage)
    Runs(storage).create(
        pipeline="p", fingerprints={"shard": FINGERPRINT}, experiment="e", config={}, site="s"
    )
    if (parts.folder / link).is_dir():
        shutil.rmtree(parts.folder / link)
    (parts.folder / link).symlink_to(other / "shard" / FINGERPRINT / link)
    before = tree(other)
    assert collect_garbage(storage, dry_run=False) == []
    assert tree(other) == before


def test_runs_that_are_a_link_out_are_refused(tmp_path, other):
    storage, before = tmp_path / "storage", tree(other)
    storage.mkdir()
    (storage / "runs").symlink_to(other / "runs")
    with pytest.raises(UserError, match="runs is a link to"):
        collect_garbage(storage, dry_run=True)
    with pytest.raises(UserError, match="runs is a link to"), Runs(storage).locked():
        pass
    with pytest.raises(UserError, match="is a link to"):
        Leases(FolderStorage()).acquire(storage / "runs/20260101-000000-abcd", "run")
    assert tree(other) == before


def test_a_storage_that_is_a_link_works(tmp_path):
    (tmp_path / "big").mkdir()
    storage = tmp_path / "storage"
    storage.symlink_to(tmp_path / "big")
    parts = begin(storage)
    parts.partial("00000.tar").write_text("ours")
    parts.publish("00000.tar")
    parts.remove("00000.tar")
    (storage / "ratio" / OTHER_FINGERPRINT).mkdir(parents=True)
    with Runs(storage).locked():
        pass
    paths = {entry.path for entry in collect_garbage(storage, dry_run=False)}
    assert paths == {storage / "ratio" / OTHER_FINGERPRINT, storage / "shard" / FINGERPRINT}
    assert is_inside(storage / "new/folder", storage) and not is_inside(tmp_path, storage)


@pytest.mark.parametrize("act", ["gc", "supersede", "damaged", "partials", "publish", "hide", "delete"])
def test_a_folder_that_becomes_a_link_after_the_check_is_not_followed(tmp_path, other, monkeypatch, act):
    """Somebody puts a link in the place of a folder between a check and the rename or deletion."""
    storage = tmp_path / "storage"
    parts = begin(storage)
    theirs = other / "shard" / FINGERPRINT
    for name in (
        "record.json",
        "output/00000.tar",
        "output/.00001.tar.partial-1",
        "superseded/1/record.json",
    ):
        (parts.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (parts.folder / name).write_text("ours")
    before = tree(other)
    swapped = storage / "shard" if act == "gc" else parts.folder if act == "supersede" else parts.output

    def swap() -> None:
        if not swapped.is_symlink():
            swapped.rename(tmp_path / "aside")
            swapped.symlink_to(other / swapped.relative_to(storage))

    # the checks of all these commands are done when the first folder is held
    held_folder = own_files.held_folder

    def held_after_swap(folder: Path, root: Path) -> AbstractContextManager[int]:
        swap()
        return held_folder(folder, root)

    monkeypatch.setattr(own_files, "held_folder", held_after_swap)
    monkeypatch.setattr(durable_files, "held_folder", held_after_swap)
    superseded = parts.folder / "superseded/1"
    actions: dict[str, Callable[[], object]] = {
        "gc": lambda: collect_garbage(storage, dry_run=False),
        "supersede": lambda: move_to_superseded(parts.folder, superseded, ["record.json"], []),
        "damaged": lambda: move_to_superseded(parts.folder, superseded, [], ["00000.tar"]),
        "partials": lambda: remove_partials(parts.output),
        "publish": lambda: parts.publish("00001.tar"),
        "hide": lambda: parts.hide(parts.output / "00000.tar"),
        "delete": lambda: parts.delete(parts.output / ".00001.tar.partial-1"),
    }
    with pytest.raises(UserError, match=r"is a link to .*, out of"):
        actions[act]()
    assert tree(other) == before and theirs.is_dir()
