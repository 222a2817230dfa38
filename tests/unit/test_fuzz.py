"""A few seconds of hostile files for every reader; `make fuzz` takes half an hour. And the watches
themselves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import NAMES
from tests.fuzz.one_target import outside
from tests.fuzz.watch import KernelWatch, PythonWatch
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]


def test_no_reader_crashes_hangs_or_touches_its_neighbours(tmp_path):
    secret = outside(tmp_path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HOME": str(secret / "home"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(secret / "tmp"),
        "MPLCONFIGDIR": str(tmp_path),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path / "hypothesis"),
    }
    command = [sys.executable, "-m", "tests.fuzz.one_target", ",".join(NAMES), str(tmp_path), "1", "1.0"]
    done = subprocess.run(
        command, cwd=secret / "cwd", env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["target"]: result["faults"] for result in results} == {name: {} for name in NAMES}
    assert all(result["cases"] for result in results)


@pytest.mark.parametrize(
    "touch",
    [
        lambda folder: (folder / "secret.png").read_bytes(),
        lambda folder: (folder / "secret.png").write_text("x"),
        lambda folder: (folder / "store" / "new").mkdir(),
        lambda folder: (folder / "secret.png").rename(folder / "moved"),
        lambda folder: (folder / "secret.png").unlink(),
        lambda folder: (folder / "secret.png").chmod(0o777),
        lambda folder: subprocess.run(["cp", folder / "secret.json", folder / "cwd"], check=True),
    ],
    ids=["read", "write", "mkdir", "rename", "unlink", "chmod", "by another program"],
)
def test_the_kernel_reports_what_is_read_and_changed(tmp_path, touch):
    folder = outside(tmp_path)
    watch = KernelWatch(folder)
    list(folder.rglob("*")), (folder / "secret.png").exists()
    assert watch.events() == [], "looking at names reads nothing"
    touch(folder)
    assert watch.events() != []


def test_python_reports_writes_anywhere_connections_and_programs(tmp_path):
    (tmp_path / "case").mkdir()
    watch = PythonWatch((tmp_path / "case",))
    (tmp_path / "before").write_text("not watched yet")
    with watch.on():
        (tmp_path / "case" / "own").write_text("x")
        (tmp_path / "before").read_text()
    assert watch.taken() == []
    with watch.on():
        (tmp_path / "other").write_text("x")
        (tmp_path / "case" / "own").rename(tmp_path / "out")
        subprocess.run(["true"], check=True)
        with socket.socket() as probe, pytest.raises(OSError):
            probe.connect(("127.0.0.1", 9))
    assert [event.split()[0] for event in watch.taken() if not event.startswith("os.posix")] == [
        "open",
        "os.rename",
        "subprocess.Popen",
        "socket.connect",
    ]
