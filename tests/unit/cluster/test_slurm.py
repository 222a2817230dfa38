"""States and errors of Slurm that the real one in tests/integration/test_slurm.py does not show.

Small programs stand for squeue and sacct: Debian's Slurm has no accounting without a database server.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.launchers.launcher import Job
from cluster.launchers.sbatch import batch_script, node_script
from cluster.launchers.shared_folder import MARKER
from cluster.launchers.slurm import SlurmJobs
from cluster.site import Site
from vico.errors import UserError

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
    folder.mkdir(parents=True, exist_ok=True)
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
    ended(jobs, 143)
    assert jobs.status(NAME).state == "unknown", "a job that was requeued starts again"
    ended(jobs, 0)
    assert jobs.status(NAME).state == "done"


def site_of(tmp_path: Path, **slurm: Any) -> Site:
    nodes = [{"name": "a", "cpus": 4}]
    settings = {"kind": "slurm", "storage": tmp_path, "nodes": nodes, "slurm": slurm}
    return Site.model_validate({**settings, "jobs": {"code": "installed"}})


def test_a_job_that_a_failed_sbatch_left_is_removed(slurm, tmp_path):
    """A controller that is slow may have taken the job although sbatch gave up."""
    slurm(
        sbatch="echo 'Socket timed out on send/recv operation' >&2; exit 1",
        scancel=f"echo $@ > {tmp_path}/gone",
    )
    jobs = SlurmJobs(tmp_path / "jobs", site_of(tmp_path))
    with pytest.raises(UserError, match="Socket timed out"):
        jobs.submit(Job(NAME, ("run", "c.yaml")))
    assert (tmp_path / "gone").read_text() == f"--name={NAME}\n"


def test_lines_of_a_site_may_read_variables_that_are_not_set(tmp_path):
    """As /etc/bashrc of some systems and scripts of conda do."""
    site = site_of(tmp_path, setup=['[ -z "$BASHRC_OF_THE_SYSTEM" ] || exit 9', "export PREPARED=1"])
    for script in (batch_script, node_script):
        text = script(Job(NAME, ("run",)), site, tmp_path)
        begin = text.index("set -u") if "set -u\n" in text else text.index("set -uo pipefail")
        end = text.index("set -u\n", text.index("PREPARED"))
        lines = text[begin:end].replace('cd "$folder" || exit 1', "") + 'set -u\necho "$PREPARED"'
        done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("1\n", "")
