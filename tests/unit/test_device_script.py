"""The script of all measurements on a GPU: a failing part does not stop the others, and is recorded."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks import device
from benchmarks.device import PARTS, part_end_s, record
from benchmarks.device_runner import END_S, Runner
from benchmarks.device_summary import summary
from tests.waiting import PATIENCE_S, wait_for_end

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "device.sh"
SLEEPER = (
    "import subprocess, sys, time; "
    "p = subprocess.Popen(['sleep', '600'], start_new_session=True); print(p.pid, flush=True); "
)


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path, dry_run=False, scratch=tmp_path, part_ends_s=time.monotonic() + 100, part="p")


def python(code):
    return sys.executable, "-c", code


def wait_for_end_of_last_number(text):
    with suppress(psutil.NoSuchProcess):
        wait_for_end([psutil.Process(int(text.split()[-1]))])


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(runner):
    """Also what left its session, as Ray's processes do: it would hold memory of the device."""
    runner.part_ends_s = time.monotonic() + 3
    entry = record(runner, lambda runner: runner.output(python(f"{SLEEPER}time.sleep(600)")))
    assert not entry["ok"] and entry["error"] == "stopped after 3 s" and entry["seconds"] < 60
    wait_for_end_of_last_number(runner.log.read_text())


def test_what_a_part_leaves_running_ends_with_it(runner):
    wait_for_end_of_last_number(runner.output(python(SLEEPER)))


def test_a_part_that_fails_says_why_and_keeps_the_rows_before(runner):
    code = (
        "import sys; file = open(sys.argv[2], 'a'); file.write('{\"ms\": 1}\\n{\"ms\"'); file.close(); "
        "print('error: no such thing', file=sys.stderr); sys.exit(3)"
    )
    entry = record(runner, lambda runner: runner.rows(python(code)))
    assert entry["error"] == "ended with 3: error: no such thing" and entry["results"] == {
        "rows": [{"ms": 1}]
    }


def test_no_part_starts_when_the_time_is_used_up(runner):
    runner.part_ends_s = time.monotonic() - 1
    entry = record(runner, PARTS["attention"].run)
    assert entry["error"] == "no time left" and entry["results"] == {"rows": []}


def test_shares_of_the_parts_fill_the_time_and_later_ones_are_kept(monkeypatch):
    names = list(PARTS)
    assert sum(part.share_s for part in PARTS.values()) == 540 - END_S
    now = 1000.0
    monkeypatch.setattr(device.time, "monotonic", lambda: now)
    for number, name in enumerate(names):  # every part uses all that it may
        end = part_end_s(1520.0, names, number)
        assert end - now == pytest.approx(PARTS[name].share_s)
        now = end
    now = 1000.0
    assert part_end_s(1260.0, names, 1) - now < PARTS[names[1]].share_s, "half of the time: smaller shares"
    assert part_end_s(1520.0, ["tests"], 0) == 1520.0


def test_a_row_that_is_needed_and_was_skipped_fails_the_part(runner):
    code = 'import sys; open(sys.argv[2], \'a\').write(\'{"skipped": "out of memory"}\\n{"ms": 1}\\n\')'

    def part(needed):
        return record(runner, lambda runner: device.rows_of(runner, python(code), lambda row: needed))

    assert part(False)["ok"]
    entry = part(True)
    assert entry["error"] == "out of memory" and len(entry["results"]["rows"]) == 2


def test_a_machine_without_the_dependencies_gets_a_result_too(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": "/bin/false"}
    ended = subprocess.run(
        [SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert ended.returncode == 1
    report = json.loads((tmp_path / "out" / "device.json").read_text())
    assert not report["ok"] and "set PYTHON or WHEELS" in report["error"]


def test_folders_are_relative_to_where_the_script_is_called(tmp_path):
    environment = {**os.environ, "OUT": "out", "PYTHON": "./false"}
    (tmp_path / "false").symlink_to("/bin/false")
    ended = subprocess.run(
        [SCRIPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 1 and (tmp_path / "out" / "device.json").is_file()


def test_a_stopped_script_keeps_what_has_ended_and_prints_a_summary(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    process = subprocess.Popen(
        [SCRIPT, "--dry-run", "--parts", "environment,attention_steps"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()  # the line of the first part
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=PATIENCE_S)
    report = json.loads((tmp_path / "device.json").read_text())
    assert first.startswith("environment: ok") and process.returncode == 1
    assert report["parts"]["environment"]["ok"] and not report["parts"]["attention_steps"]["ok"]
    assert "stopped by SIGTERM" in rest and "attention_steps" in rest


@pytest.mark.slow
def test_the_dry_run_runs_every_part(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    ended = subprocess.run(
        [SCRIPT, "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=4 * PATIENCE_S,
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
    assert summary(report) in ended.stdout and len(summary(report).splitlines()) <= 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.json", "log.txt"]
