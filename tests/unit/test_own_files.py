"""Temporary folders and locks with names that others can guess: no hang, and nothing of others is used."""

import fcntl
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from cluster.metric_lines import MetricsWriter
from cluster.ray_start.local import FOLDER_PREFIX, OWNER_FILE, remove_abandoned_folders, temporary_ray_folder
from data_prep.shards.cache import _locked
from stages.durable_files import locked
from tests.waiting import PATIENCE_S
from vico.errors import UserError
from vico.own_files import LogFile, make_own_folder

OPENERS = {
    "lock of a folder": lambda path: locked(path.parent).__enter__(),
    "lock of the shard cache": lambda path: _locked(path).__enter__(),
    "metrics": MetricsWriter,
    "log": LogFile,
}


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


PLANTED = {
    "FIFO": os.mkfifo,
    "link": lambda path: path.symlink_to(path.parent / "victim"),
    "broken link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": make_socket,
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("opener", OPENERS)
def test_a_file_that_others_planted_is_refused_without_waiting(tmp_path, monkeypatch, planted, opener):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "victim").write_text("theirs")
    PLANTED[planted](Path("lease.lock") if planted == "socket" else tmp_path / "lease.lock")
    errors: list[Exception] = []

    def open_it() -> None:
        try:
            OPENERS[opener](tmp_path / "lease.lock")
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=open_it, daemon=True)
    thread.start()
    thread.join(timeout=PATIENCE_S)
    assert not thread.is_alive(), "it waits"
    [error] = errors
    assert isinstance(error, UserError) and "lease.lock is" in str(error) and "remove it" in str(error)
    assert (tmp_path / "victim").read_text() == "theirs" and not (tmp_path / "nowhere").exists()


def test_the_folder_of_a_ray_is_closed_to_others():
    with temporary_ray_folder(None) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_only_own_abandoned_folders_are_removed(tmp_path):
    """Not those behind links, and a FIFO in the place of the lock holds nothing up."""
    own, fifo, linked = (tmp_path / f"{FOLDER_PREFIX}{name}" for name in ("own", "fifo", "linked"))
    elsewhere = tmp_path / "elsewhere"
    for folder in (own, elsewhere, fifo):
        folder.mkdir()
    for folder in (own, elsewhere):
        (folder / OWNER_FILE).touch()
    os.mkfifo(fifo / OWNER_FILE)
    linked.symlink_to(elsewhere)
    held = tmp_path / f"{FOLDER_PREFIX}held"
    held.mkdir()
    with open(held / OWNER_FILE, "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        remove_abandoned_folders(tmp_path)
    assert not own.exists()
    assert held.exists() and fifo.exists() and (elsewhere / OWNER_FILE).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_folders_of_other_users_are_neither_removed_nor_used(tmp_path):
    theirs = tmp_path / f"{FOLDER_PREFIX}theirs"
    theirs.mkdir()
    (theirs / OWNER_FILE).touch()
    os.chown(theirs, 64001, 64001)
    remove_abandoned_folders(tmp_path)
    assert theirs.exists()
    with pytest.raises(UserError, match=r"theirs is not a folder of root but of user 64001.*set a folder"):
        make_own_folder(theirs, "set a folder")


def test_an_own_folder_is_made_or_closed_to_writers(tmp_path):
    folder, link = tmp_path / "new" / "folder", tmp_path / "link"
    make_own_folder(folder, "-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    make_own_folder(folder, "-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    link.symlink_to(folder)
    with pytest.raises(UserError, match="link is not a folder of"):
        make_own_folder(link, "-")
