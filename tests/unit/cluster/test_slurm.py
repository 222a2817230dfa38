"""States and errors of Slurm that the real one in tests/integration/test_slurm.py does not show.

Small programs stand for squeue and sacct: Debian's Slurm has no accounting without a database server.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.launchers.shared_folder import MARKER
from cluster.launchers.slurm import SlurmJobs

NAME = "vico-x"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Callable[..., SlurmJobs]:
    """Return a function that makes a Slurm whose commands answer with these texts."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    def make(**answers: str) -> SlurmJobs:
        for command, answer in answers.items():
            (folder / command).write_text(f"#!/bin/sh\n{answer}\n")
            (folder / command).chmod(0o755)
        return SlurmJobs(tmp_path / "jobs")

    return make


def ended(jobs: SlurmJobs, code: int) -> None:
    folder = Path(jobs.folder, NAME)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps({"exit_code": code}))


@pytest.mark.parametrize(
    "line, state, message",
    [
        ("7|PENDING|Resources", "pending", "job 7 is PENDING (Resources)"),
        ("7|REQUEUE_HOLD|job requeued in held state", "pending", "(job requeued in held state)"),
        ("7|RUNNING|None", "running", "job 7 is RUNNING"),
        ("7|COMPLETING|None", "running", "job 7 is COMPLETING"),
        ("7|CANCELLED|None", "cancelled", "job 7 is CANCELLED"),
        ("7|TIMEOUT|TimeLimit", "failed", "job 7 is TIMEOUT (TimeLimit); see "),
        ("7|NODE_FAIL|NodeDown", "failed", "job 7 is NODE_FAIL (NodeDown); see "),
        ("7|OUT_OF_MEMORY|OutOfMemory", "failed", "job 7 is OUT_OF_MEMORY (OutOfMemory)"),
    ],
)
def test_states_come_with_slurms_reason(slurm, line, state, message):
    status = slurm(squeue=f"echo '{line}'").status(NAME)
    assert status.state == state and message in status.message


def test_success_is_the_marker_and_not_the_exit_code_of_the_script(slurm):
    jobs = slurm(squeue="echo '7|COMPLETED|None'")
    assert jobs.status(NAME).state == "done"
    ended(jobs, 1)
    assert jobs.status(NAME).state == "failed"


def test_a_job_that_the_queue_has_forgotten_is_asked_of_the_accounting(slurm):
    jobs = slurm(squeue="true", sacct="echo '7|CANCELLED by 1000|None'")
    assert jobs.status(NAME) == ("cancelled", "job 7 is CANCELLED")
    jobs = slurm(squeue="true", sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    status = jobs.status(NAME)
    assert status.state == "unknown" and "Slurm accounting storage is disabled" in status.message
    ended(jobs, 0)
    assert jobs.status(NAME).state == "done"


def test_a_controller_that_is_away_leaves_the_state_unknown(slurm):
    jobs = slurm(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    status = jobs.status(NAME)
    assert status.state == "unknown" and "Unable to contact slurm controller" in status.message
    assert jobs.cancel(NAME) is False
