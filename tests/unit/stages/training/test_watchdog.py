"""A hung process leaves its stacks in the attempt's folder, and nothing there as long as it steps."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.training.faults import hung_ranks
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[4]
CODE = """
import ctypes, sys, time
from pathlib import Path
from stages.training.faults import Watchdog
folder, end = Path(sys.argv[1]), sys.argv[2]
watchdog = Watchdog(folder, 3, 1.0 if end == "hang" else 600.0)
for step in range(3):
    watchdog.step_done(step)
print(sorted(path.name for path in folder.iterdir()), watchdog._file.name, flush=True)
if end == "hang":
    ctypes.PyDLL(None).sleep(600)  # holds Python's lock
if end == "wait":
    time.sleep(600)
watchdog.close()
"""


def started(folder: Path, end: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CODE, str(folder), end]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_hang_with_pythons_lock_leaves_stacks_and_steps_write_nothing_there(tmp_path):
    process = started(tmp_path, "hang")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert output.startswith("[]")
    (line,) = hung_ranks(tmp_path, "start")
    assert line.startswith("rank 3: last step 2, no further one within 1 s (stacks in ")
    kept = tmp_path / "hung-start-3.txt"
    assert "Timeout" in kept.read_text() and '"<string>"' in kept.read_text()


@pytest.mark.parametrize("end", ["done", "wait"])
def test_another_end_leaves_nothing(tmp_path, end):
    process = started(tmp_path, end)
    assert process.stdout.readline().startswith("[]")
    if end == "wait":
        os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=PATIENCE_S)
    process.stdout.close()
    assert hung_ranks(tmp_path, "start", wait_s=1.0) == []
    assert list(tmp_path.iterdir()) == []
