"""The script of all measurements on a GPU: a failing part does not stop the others, and is recorded."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device import PARTS, PartFailed, Runner, record

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "device.sh"


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path, dry_run=False, ends_s=time.monotonic() + 100, scratch=tmp_path)


def python(code):
    return sys.executable, "-c", code


def test_a_part_that_hangs_is_stopped_with_its_children(runner):
    sleeper = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    entry = record(runner, lambda runner: runner.output(python(f"{sleeper}; time.sleep(600)"), 3.0))
    assert not entry["ok"] and entry["error"] == "stopped after 3 s" and entry["seconds"] < 60
    child = int(runner.log.read_text().split()[-1])
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the part's child still runs")


def test_a_part_that_fails_says_why_and_keeps_what_it_had(runner):
    def part(runner):
        try:
            runner.output(
                python("import sys; print('error: no such thing', file=sys.stderr); sys.exit(3)"), 60
            )
        except RuntimeError as failed:
            raise PartFailed(str(failed), {"rows": [1]}) from failed

    entry = record(runner, part)
    assert entry["error"] == "ended with 3: error: no such thing" and entry["results"] == {"rows": [1]}


def test_no_part_starts_when_the_time_is_used_up(tmp_path):
    late = Runner(tmp_path, dry_run=False, ends_s=time.monotonic() - 1, scratch=tmp_path)
    assert record(late, PARTS["attention"])["error"] == "no time left"


def test_a_machine_without_the_dependencies_gets_a_result_too(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": "/bin/false"}
    ended = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    report = json.loads((tmp_path / "out" / "device.json").read_text())
    assert not report["ok"] and "set PYTHON or WHEELS" in report["error"]


@pytest.mark.slow
def test_the_dry_run_runs_every_part(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    ended = subprocess.run(
        [SCRIPT, "--dry-run"], env=environment, capture_output=True, text=True, check=False, timeout=3600
    )
    report = json.loads((tmp_path / "device.json").read_text())
    failed = {name: part["error"] for name, part in report["parts"].items() if not part["ok"]}
    assert (failed, ended.returncode) == ({}, 0), (tmp_path / "log.txt").read_text()[-3000:]
    assert set(report["parts"]) == set(PARTS)
    run = report["parts"]["quickstart"]["results"]
    assert {stage["state"] for stage in run["stages"]} == {"done"} and run["audit"]["ok"]
    engine_rows = report["parts"]["deepspeed"]["results"]["rows"]
    assert all(row["seconds"] > 0 and row["computed_memory_gb"] > 0 for row in engine_rows)
    assert {row["case"] for row in report["parts"]["loss"]["results"]["rows"]} >= {"ours", "dense"}
