"""Kind local: `vico submit` starts a run in the background; it outlives its terminal and can be cancelled."""

import json
from pathlib import Path

import psutil
import pytest

from tests.integration.demo_pipeline import answer, finished, vico, write_pipeline
from tests.waiting import wait_for_end, wait_until


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    write_pipeline(tmp_path)
    return [str(tmp_path / "pipeline.yaml"), "--site", str(tmp_path / "site.yaml")]


def test_a_background_run_is_followed_cancelled_and_resumed(arguments, tmp_path):
    site = arguments[1:]
    submitted = answer("submit", *arguments, "--until", "shard")
    run, submission = submitted["run"], submitted["submission"]
    assert submission["kind"] == "local"
    run_file = tmp_path / "runs" / "runs" / run / "run.json"
    wait_until(lambda: json.loads(run_file.read_text())["attempts"])
    driver = json.loads(run_file.read_text())["attempts"][-1]["pid"]
    code, out, err = finished(vico("cancel", run, *site))
    assert code == 0 and "is cancelled" in out, err
    assert not psutil.pid_exists(driver)
    assert answer("status", run, *site)["state"] == "interrupted"

    again = answer("submit", *arguments, "--until", "shard")
    assert again["run"] == run
    code, out, err = finished(vico("logs", "-f", run, *site))
    assert code == 0 and f"run {run}: done until " in out.splitlines()[-1], out + err
    code, out, err = finished(vico("cancel", run, *site))
    assert code == 0 and "nothing to cancel" in out
    assert "shard: done" in finished(vico("logs", "--job", run, *site))[1]

    job = tmp_path / "runs" / "jobs" / again["submission"]["id"]
    assert job.is_dir()
    answer("gc", *site)
    assert job.is_dir(), "its run is kept"
    answer("gc", *site, "--drop", run)
    assert not job.exists()


@pytest.mark.slow
def test_a_run_that_was_not_submitted_cannot_be_cancelled(arguments, tmp_path):
    run = answer("run", *arguments, "--until", "shard")["run"]
    code, _, err = finished(vico("cancel", run, *arguments[1:]))
    assert (code, err.count("\n")) == (2, 1)
    assert "was not submitted; stop its driver where it works" in err


def test_a_process_that_vanished_is_reported(arguments, tmp_path):
    """Killed with its program, so that nobody writes an end."""
    submitted = answer("submit", *arguments, "--until", "shard")
    folder = Path(submitted["submission"]["folder"], submitted["submission"]["id"])
    program = psutil.Process(json.loads((folder / "host.json").read_text())["pid"])
    run_file = tmp_path / "runs" / "runs" / submitted["run"] / "run.json"
    wait_until(lambda: json.loads(run_file.read_text())["attempts"])
    family = [program, *program.children(recursive=True)]
    program.kill()
    wait_for_end(family)
    status = answer("status", submitted["run"], *arguments[1:])
    assert status["state"] == "interrupted"


def test_no_job_is_written_through_a_link(arguments, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "jobs").symlink_to(tmp_path / "elsewhere")
    code, _, err = finished(vico("submit", *arguments, "--until", "shard"))
    assert (code, err.count("\n")) == (2, 1), err
    assert "jobs is a link to" in err
    assert list((tmp_path / "elsewhere").iterdir()) == []
