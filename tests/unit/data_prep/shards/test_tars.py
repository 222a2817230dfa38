"""Shard tars: plain WebDataset, exact offsets, the same bytes every time."""

import errno
import hashlib
import os
import subprocess
import tarfile
import time
from itertools import chain
from pathlib import Path

import pytest
import webdataset

from data_prep.shards import tars
from data_prep.shards.tars import Member, ShardTar

SAMPLES = [
    ("a-00000001", [("json", b'{"a": 1}'), ("jpg", b"x" * 1000)]),
    ("a-00000002", [("json", b"{}"), ("0.png", b"y" * 512), ("1.webp", b"")]),
    ("b" * 64 + "-00000003", [("json", b"z" * 20_000)]),
]
NAMES = [f"{key}.{extension}" for key, members in SAMPLES for extension, _ in members]


def write(path: Path) -> tuple[ShardTar, list[Member]]:
    with ShardTar(path) as tar:
        members = [tar.write(*sample) for sample in SAMPLES]
    return tar, list(chain(*members))


def test_offsets_size_and_digest_are_those_of_the_file(tmp_path):
    tar, members = write(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    data = [data for _, sample in SAMPLES for _, data in sample]
    for member, expected in zip(members, data, strict=True):
        assert content[member.offset : member.offset + member.num_bytes] == expected
    assert tar.num_bytes == len(content) and tar.sha256 == hashlib.sha256(content).hexdigest()


def test_the_bytes_equal_those_of_webdatasets_writer(tmp_path):
    samples = [*SAMPLES, *[(f"n-{n:08d}", [("json", b"x" * n), ("jpg", b"y" * 37 * n)]) for n in range(600)]]
    for number, chosen in enumerate((samples, samples[:1], samples[:20], [])):
        ours, theirs = tmp_path / f"{number}-ours.tar", tmp_path / f"{number}-theirs.tar"
        with ShardTar(ours) as tar:
            for sample in chosen:
                tar.write(*sample)
        form = {"user": "vico", "group": "vico", "mode": 0o444, "mtime": 0}
        with webdataset.TarWriter(str(theirs), encoder=False, compress=False, **form) as writer:
            for key, members in chosen:
                for extension, data in members:
                    writer.write({"__key__": key, extension: data})
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_number_of_unsynced_bytes_is_bounded(tmp_path, monkeypatch):
    synced = [0]

    def slow_disk(file: int) -> None:
        size = os.fstat(file).st_size
        time.sleep(0.01)
        synced.append(size)

    monkeypatch.setattr(tars, "UNSYNCED_BYTES", 100_000)
    monkeypatch.setattr(tars.os, "fdatasync", slow_disk)
    with ShardTar(tmp_path / "a.tar") as tar:
        for n in range(100):
            tar.write(f"a-{n:08d}", [("jpg", bytes(10_000))])
            assert tar.num_bytes - synced[-1] < 100_000 + 2 * 10_752
    assert len(synced) > 10


def test_an_error_of_a_background_sync_stops_the_writer(tmp_path, monkeypatch):
    def full_disk(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tars, "UNSYNCED_BYTES", 100_000)
    monkeypatch.setattr(tars.os, "fdatasync", full_disk)
    with pytest.raises(OSError, match="No space left"), ShardTar(tmp_path / "a.tar") as tar:
        tar.write("a-00000000", [("jpg", bytes(100_000))])


def test_the_bytes_depend_only_on_names_and_data(tmp_path):
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "vico")


def test_webdataset_and_tar_can_read_it(tmp_path):
    write(tmp_path / "a.tar")
    with ShardTar(tmp_path / "empty.tar"):
        pass
    samples = list(
        webdataset.WebDataset([str(tmp_path / n) for n in ("empty.tar", "a.tar")], shardshuffle=False)
    )
    assert [sample["__key__"] for sample in samples] == ["a-00000001", "a-00000002", "b" * 64 + "-00000003"]
    assert samples[0]["jpg"] == b"x" * 1000 and samples[1]["0.png"] == b"y" * 512
    listed = subprocess.run(["tar", "tf", tmp_path / "a.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == NAMES
    assert (
        subprocess.run(["tar", "tf", tmp_path / "empty.tar"], capture_output=True, check=True).stdout == b""
    )
