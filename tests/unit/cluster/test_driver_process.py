"""The program that keeps a job's driver alive: restarts after deaths, stops, exit codes, no orphans."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[3]


def start(folder: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """Start the program with a driver that runs this script in `folder`."""
    command = [sys.executable, "-m", "cluster.launchers.driver_process", "--pause=0.1", *options]
    command += ["--marker=ended.json", "--pid-file=pid", "--", "bash", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def exit_code(folder: Path) -> int:
    return json.loads((folder / "ended.json").read_text())["exit_code"]


def test_a_driver_that_dies_is_started_again_and_its_end_is_passed_on(tmp_path):
    script = "echo x >> starts; [ $(wc -l < starts) = 3 ] || kill -KILL $$; exit 7"
    process = start(tmp_path, script, "--restarts=2")
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, exit_code(tmp_path)) == (7, 7)
    assert err.count("the driver died of SIGKILL; starts again in 0.1 s") == 2
    assert (tmp_path / "starts").read_text().count("x") == 3


@pytest.mark.parametrize(
    "script, restarts, code",
    [("exit 0", 2, 0), ("exit 1", 2, 1), ("exit 2", 2, 2), ("kill -KILL $$", 1, 137)],
)
def test_a_driver_that_ends_by_itself_is_not_started_again(tmp_path, script, restarts, code):
    process = start(tmp_path, f"echo x >> starts; {script}", f"--restarts={restarts}")
    process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, exit_code(tmp_path)) == (code, code)
    assert (tmp_path / "starts").read_text().count("x") == (2 if code == 137 else 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_reaches_the_driver_once_and_ends_the_restarts(tmp_path, number):
    script = "trap 'echo stop >> stops; exit 143' TERM; touch ready; while true; do sleep 0.05; done"
    process = start(tmp_path, script, "--restarts=5")
    wait_until((tmp_path / "ready").exists, process)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, exit_code(tmp_path)) == (143, 143)
    assert (tmp_path / "stops").read_text() == "stop\n"


def test_a_driver_dies_with_its_program(tmp_path):
    """A killed job must leave no driver that goes on working on the run."""
    process = start(tmp_path, "echo $$ > driver; while true; do sleep 0.05; done")
    wait_until((tmp_path / "driver").exists, process)
    time.sleep(0.1)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    driver = Path("/proc", (tmp_path / "driver").read_text().strip(), "stat")
    wait_until(lambda: not driver.exists() or driver.read_text().rpartition(")")[2].split()[0] in "ZX")
    assert not (tmp_path / "ended.json").exists()


def test_the_marker_of_an_earlier_start_is_taken_away(tmp_path):
    (tmp_path / "ended.json").write_text('{"exit_code": 143}')
    process = start(tmp_path, "[ ! -e ended.json ]")
    process.communicate(timeout=PATIENCE_S)
    assert exit_code(tmp_path) == 0
