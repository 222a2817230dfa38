"""A real Slurm of two nodes on one machine: submit, follow, requeue mid-training, resume, cancel.

Each start of a job costs about a minute here: Ray on two hosts, then the ranks.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts import Host
from tests.integration.demo_pipeline import ROOT, answer, finished, model_files, vico, write_pipeline
from tests.slurm_cluster import needs_slurm, slurm_cluster
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, *needs_slurm]


@dataclass(frozen=True)
class Project:
    """A small pipeline and a site for the Slurm of these tests."""

    folder: Path
    login: Host

    @property
    def site(self) -> list[str]:
        return ["--site", str(self.folder / "slurm.yaml")]

    @property
    def config(self) -> str:
        return str(self.folder / "pipeline.yaml")

    def write_site(self, **slurm: Any) -> None:
        """Write the site; `slurm` are further settings of its block."""
        site = yaml.safe_load((self.folder / "site.yaml").read_text())
        site |= {
            "kind": "slurm",
            "nodes": [{"name": "cpu", "count": 2, "cpus": 2}],
            "jobs": {"python": sys.executable},
            "slurm": slurm,
        }
        (self.folder / "slurm.yaml").write_text(yaml.safe_dump(site))

    def vico(self, *arguments: object) -> tuple[int, str, str]:
        return finished(self.start(*arguments))

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start the command line on the login node."""
        # Jobs get this environment from sbatch. Ray's workers have niceness 15 by default, and starve on a
        # busy machine.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return self.login.start(*command, env=environment, **pipes)

    def answer(self, *arguments: object) -> Any:
        code, out, err = self.vico(*arguments, "--json")
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    def slurm(self, *words: str) -> str:
        done = self.login.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start_at_once(self, number: str) -> None:
        """Take the two minutes back that Slurm lets a requeued job wait."""

        def is_pending() -> bool:
            return self.slurm("squeue", "-h", "--format=%T", f"--jobs={number}") == "PENDING"

        wait_until(is_pending)
        # A requeued job's credential is revoked with a time in seconds: a start within that second is killed.
        time.sleep(1.5)
        self.slurm("scontrol", "update", f"JobId={number}", "StartTime=now")

    def steps(self) -> int:
        """Return the number of the last step that the training has logged."""
        lines = [
            line
            for path in self.folder.glob("runs/consistency/*/attempts/*/metrics.jsonl")
            for line in path.read_text().splitlines()
        ]
        return max((json.loads(line).get("step", 0) for line in lines), default=0)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition; fail when it takes too long, or when no job is left that could fulfil it."""

        def holds() -> object:
            if condition():
                return True
            assert self.slurm("squeue", "-h"), "the job has ended"
            return False

        wait_until(holds, pause_s=0.5)

    @contextmanager
    def logs_of_failure(self, *processes: subprocess.Popen[str]) -> Iterator[None]:
        """Print what the jobs and the stages wrote if the body fails; end the processes then."""
        try:
            yield
        except BaseException:
            for process in processes:
                process.kill()
                print("\n".join(process.communicate()))
            print(self.login.run("scontrol", "show", "job").stdout)
            slurms_own = Path(os.environ["SLURM_CONF"]).parent.glob("slurm*.log")
            for path in [*sorted(slurms_own), *sorted(self.folder.glob("runs/**/*.log"))]:
                print(f"==== {path}\n{path.read_text(errors='replace')[-6000:]}")
            self.login.run("scancel", "--full", "--state=RUNNING,PENDING,SUSPENDED")
            raise

    def stage(self, run: str, name: str) -> dict[str, Any]:
        stages = self.answer("status", run, *self.site)["stages"]
        return next(stage for stage in stages if stage["name"] == name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, Host]]:
    folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    try:
        with slurm_cluster(folder) as machines:
            yield machines
    finally:
        shutil.rmtree(folder)


def small_project(folder: Path, login: Host) -> Project:
    folder.mkdir()
    path = write_pipeline(folder)
    pipeline = yaml.safe_load(path.read_text())
    pipeline["inputs"]["records"]["num_samples"] = 64
    pipeline["consistency"] |= {"epochs": 30, "max_steps": 40, "validate_every_steps": 20}
    path.write_text(yaml.safe_dump(pipeline))
    project = Project(folder, login)
    project.write_site()
    return project


@pytest.fixture
def project(tmp_path, cluster) -> Project:
    """A project in a folder whose name must be quoted in scripts and in directives of sbatch."""
    return small_project(tmp_path / "it's 100% of $HOME", cluster["login"])


def test_a_requeued_run_ends_with_the_weights_of_an_undisturbed_one(project):
    """All stages. Stopped as before a time limit, which publishes a checkpoint, and then killed by a plain
    requeue."""
    submitted = project.answer("submit", project.config, *project.site)
    run, job = submitted["run"], submitted["submission"]["id"]
    following = project.start("logs", "-f", run, *project.site)
    log = project.folder / "runs" / "jobs" / job / "job.log"
    with project.logs_of_failure(following):
        project.wait_until(lambda: project.steps() >= 4)
        number = project.slurm("squeue", "-h", f"--name={job}", "--format=%i")
        project.slurm("scancel", "--batch", "--signal=USR1", number)
        project.wait_until(lambda: "requeued; the run resumes" in log.read_text())
        project.start_at_once(number)
        before = project.steps()
        project.wait_until(lambda: project.steps() >= before + 4)
        project.slurm("scontrol", "requeue", number)
        project.start_at_once(number)
        code, out, err = finished(following)
    assert code == 0, err
    assert "consistency: resumes" in out or "attempt 2" in out
    assert f"run {run}: done" in out, (out, log.read_text())
    assert project.stage(run, "consistency")["attempt"] == 3

    folder = project.folder
    alone = answer("run", project.config, "--site", folder / "site.yaml", "--storage", folder / "alone")
    assert alone["state"] == "done"
    for stage in ("consistency", "router", "export"):
        weights = [model_files(folder / storage, stage) for storage in ("runs", "alone")]
        assert weights[0] and weights[0] == weights[1], stage
    assert project.slurm("squeue", "-h") == ""


def test_a_job_that_waits_shows_slurms_reason_and_a_cancelled_one_leaves_nothing(project):
    project.slurm("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        submitted = project.answer("submit", project.config, *project.site)
        run = submitted["run"]
        shown = project.slurm("scontrol", "show", "job")
        log = project.folder / "runs" / "jobs" / submitted["submission"]["id"] / "job.log"
        assert f"StdOut={log}\n".replace("%", "%%") in shown, shown
        code, out, err = project.vico("logs", "-f", run, *project.site, "--start-timeout", 10)
        assert code == 0, err
        assert "is PENDING (" in out and "it did not start within 10 s" in out
        status = project.answer("status", run, *project.site)
        assert status["state"] == "pending" and "is PENDING (" in status["error"]
        code, out, err = project.vico("submit", project.config, *project.site)
        assert code == 0 and "already" in out
        code, out, err = project.vico("cancel", run, *project.site)
        assert code == 0 and "is cancelled" in out, err
    finally:
        project.slurm("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert project.slurm("squeue", "-h") == ""
    assert project.answer("status", run, *project.site)["state"] == "cancelled"


@pytest.mark.skipif(shutil.which("sshd", path="/usr/sbin") is None, reason="needs openssh-server")
def test_a_job_without_srun_is_cancelled_with_a_checkpoint(tmp_path, cluster):
    """Nodes are started through a real ssh."""
    project = small_project(tmp_path / "plain", cluster["login"])
    project.write_site(start_on_node=["ssh", "-F", str(ssh_config(project.folder, cluster)), "{host}"])
    submitted = project.answer("submit", project.config, *project.site, "--until", "consistency")
    run, job = submitted["run"], submitted["submission"]["id"]
    with project.logs_of_failure():
        project.wait_until(lambda: project.steps() >= 2)
        code, out, err = project.vico("cancel", run, *project.site)
        assert code == 0 and "is cancelled" in out, err
    log = (project.folder / "runs" / "jobs" / job / "job.log").read_text()
    assert "the ranks end their step and publish a checkpoint" in log
    assert project.slurm("squeue", "-h") == ""
    status = project.answer("status", run, *project.site)
    assert status["state"] == "interrupted"
    for node in ("n1", "n2"):
        left = cluster[node].run("ps", "-e", "-o", "comm=").stdout.split()
        assert not {"raylet", "gcs_server"} & set(left), left
    code, out, _ = project.vico("logs", "--job", run, *project.site)
    assert code == 0 and "the ranks end their step and publish a checkpoint" in out


def ssh_config(folder: Path, cluster: dict[str, Host]) -> Path:
    """Start an ssh server on both nodes; return the client's config file."""
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "key.pub").read_text())
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "Port": 2222,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
        "UsePAM": "no",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    for node in ("n1", "n2"):
        cluster[node].start("/usr/sbin/sshd", "-D", "-f", folder / "sshd_config")
    config = folder / "ssh_config"
    config.write_text(
        f"Port 2222\nIdentityFile {folder / 'key'}\nBatchMode yes\nLogLevel ERROR\n"
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
    )
    return config


def test_wrong_requests_are_refused_before_anything_is_submitted(project):
    project.write_site(partition="nowhere")
    code, _, err = project.vico("submit", project.config, *project.site)
    assert code == 2 and "sbatch refuses the job (" in err and "nvalid partition" in err
    assert project.slurm("squeue", "-h") == ""
    project.write_site()
    process = vico("submit", project.config, *project.site, extra_environment={"PATH": "/nonexistent"})
    code, _, err = finished(process)
    assert code == 2 and "sbatch is not on PATH" in err
