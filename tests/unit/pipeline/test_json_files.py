"""Files of a storage on a disk that is full."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.json_files import write_bytes_once, write_json


def test_a_full_disk_is_an_error_with_the_path_and_leaves_the_old_file(tmp_path, monkeypatch):
    """The system names no file for a write that fails; the command line shows only errors that name one."""
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write_json(path, {"a": 2})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"] and '"a": 1' in path.read_text()


def test_of_writers_at_once_one_wins_and_no_other_file_is_left(tmp_path):
    path = tmp_path / "id"
    start = threading.Barrier(8)

    def write(number: int) -> bytes:
        start.wait()
        write_bytes_once(path, b"%d" % number)
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        read = set(pool.map(write, range(8)))
    assert read == {path.read_bytes()}
    assert os.listdir(tmp_path) == ["id"]
