"""A real Ray Jobs server on loopback: submit, follow, status; a job that fails before its driver starts."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.demo_pipeline import finished, vico, write_pipeline
from tests.ports import free_port
from tests.waiting import wait_until


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Start a Ray head and yield its address. Its token is in the environment of this process."""
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += [f"--temp-dir={folder}", "--disable-usage-stats", "--dashboard-host=127.0.0.1"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VICO")}
        environment.pop("RAY_ADDRESS", None)
        with Path(folder, "head.log").open("w") as log:
            head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(
                lambda: answers(ports["dashboard-port"]),
                head,
                pause_s=0.2,
                or_else=Path(folder, "head.log").read_text,
            )
            yield f"http://127.0.0.1:{ports['dashboard-port']}"
        finally:
            family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
            for process in family:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            head.wait()
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@dataclass(frozen=True)
class Project:
    """A small pipeline in a folder, with its site file and storage."""

    folder: Path

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def site(self) -> list[str]:
        return ["--site", str(self.folder / "site.yaml")]

    def run_arguments(self, **jobs: str) -> list[str]:
        """Set fields of `jobs` in the site file; return the arguments of `vico submit`."""
        path = self.folder / "site.yaml"
        site = yaml.safe_load(path.read_text())
        kind = jobs.pop("kind", None)
        site["jobs"] = {"python": sys.executable, **jobs}
        site.pop("kind", None)
        if kind is not None:
            site["kind"] = kind
        path.write_text(yaml.safe_dump(site))
        return [str(self.folder / "pipeline.yaml"), *self.site, "--until", "shard"]


@pytest.fixture
def project(tmp_path) -> Project:
    write_pipeline(tmp_path)
    return Project(tmp_path)


@pytest.mark.slow
def test_a_job_that_never_started_is_submitted_again_and_followed_to_the_end(server, project):
    """The first job fails before its driver starts."""
    code, out, err = finished(
        vico("submit", *project.run_arguments(address=server, python="/no/such/python"), "--json")
    )
    assert code == 0, err
    submitted = json.loads(out)
    run = submitted["run"]
    assert submitted["state"] == "pending"
    assert submitted["submission"]["id"].startswith(f"vico-{run}-")
    code, followed, err = finished(vico("logs", "-f", run, *project.site))
    assert f"run {run}: failed: job vico-{run}-" in followed
    assert "/no/such/python" in followed
    status = json.loads(finished(vico("status", run, *project.site, "--json"))[1])
    assert status["state"] == "failed"
    assert "/no/such/python" in status["error"]

    # After the mistake is fixed, the same command continues the same run.
    arguments = project.run_arguments(address=server)
    code, out, err = finished(vico("submit", *arguments, "--json"))
    assert code == 0, err
    assert json.loads(out)["run"] == run
    submission = json.loads(out)["submission"]
    code, out, err = finished(vico("submit", *arguments))
    assert code == 0, err
    assert "already" in out, "a second submission of a running job starts nothing"
    code, followed, err = finished(vico("logs", "-f", run, *project.site))
    assert code == 0, err
    assert "shard: done" in followed
    assert f"run {run}: done until shard" in followed.splitlines()[-1]

    status = json.loads(finished(vico("status", run, *project.site, "--json"))[1])
    assert (status["state"], [stage["state"] for stage in status["stages"]]) == ("done", ["done"])
    assert status["submission"] == submission, "the job took its run for another one"
    assert len(json.loads(finished(vico("status", *project.site, "--json"))[1])) == 1
    record = json.loads(Path(status["stages"][0]["path"], "..", "record.json").resolve().read_text())
    from pipeline.identity.provenance import git_state

    assert record["git"]["commit"] == git_state()["commit"], "the package has no .git, but it says the commit"

    code, out, err = finished(vico("submit", *arguments))
    assert (code, "there is nothing to submit" in out) == (0, True)


def test_without_a_server_the_error_is_one_line_and_nothing_is_written(project):
    port = free_port()
    for jobs, message in (
        ({"address": f"http://127.0.0.1:{port}"}, "no Ray Jobs server answers there"),
        ({"kind": "ray"}, "jobs.address is not set in site test"),
    ):
        code, _, err = finished(vico("submit", *project.run_arguments(**jobs)))
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("error: jobs.address")
        assert message in err
        assert not project.storage.exists()


def test_print_shows_the_job_without_submitting_it(project):
    code, out, err = finished(vico("submit", *project.run_arguments(address="http://127.0.0.1:1"), "--print"))
    assert code == 0, err
    assert f"entrypoint: {sys.executable} -m cluster.launchers.driver_process --restarts=2" in out
    assert f"-- {sys.executable} -m pipeline.cli run submitted/config.yaml --site" in out
    assert f"storage: {project.storage}" in out
    assert "samples_per_shard: 32" in out
    assert not project.storage.exists()


def test_a_driver_that_is_killed_starts_again_in_its_job(server, project):
    """Ray Jobs has no retries: without ours, the kernel's out-of-memory killer would end the job."""
    code, out, err = finished(vico("submit", *project.run_arguments(address=server), "--json"))
    assert code == 0, err
    run = json.loads(out)["run"]
    run_file = project.storage / "runs" / run / "run.json"
    wait_until(lambda: json.loads(run_file.read_text())["attempts"])
    os.kill(json.loads(run_file.read_text())["attempts"][-1]["pid"], signal.SIGKILL)
    code, followed, err = finished(vico("logs", "-f", run, *project.site))
    assert f"run {run}: done until shard" in followed.splitlines()[-1], followed + err
    assert (
        "the driver died of SIGKILL; starts again" in finished(vico("logs", "--job", run, *project.site))[1]
    )
    assert len(json.loads(run_file.read_text())["attempts"]) == 2


@pytest.mark.slow
def test_a_cancelled_job_leaves_nothing_and_the_same_command_resumes_the_run(server, project):
    arguments = project.run_arguments(address=server)
    code, out, err = finished(vico("submit", *arguments, "--json"))
    assert code == 0, err
    run = json.loads(out)["run"]
    run_file = project.storage / "runs" / run / "run.json"
    wait_until(lambda: json.loads(run_file.read_text())["attempts"])
    driver = json.loads(run_file.read_text())["attempts"][-1]["pid"]
    code, out, err = finished(vico("cancel", run, *project.site))
    assert code == 0 and "is cancelled" in out, err
    assert not psutil.pid_exists(driver)
    assert json.loads(finished(vico("status", run, *project.site, "--json"))[1])["state"] == "interrupted"
    first_job = json.loads(run_file.read_text())["submission"]["id"]
    code, out, err = finished(vico("submit", *arguments, "--json"))
    assert json.loads(out)["run"] == run
    assert json.loads(run_file.read_text())["submission"]["id"] != first_job, "another job, right after"
    followed = finished(vico("logs", "-f", run, *project.site))[1]
    assert f"run {run}: done until shard" in followed.splitlines()[-1], followed


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}])
def test_a_cluster_that_wants_another_token_is_one_line_at_once(server, tmp_path, variables):
    write_pipeline(tmp_path)
    site = yaml.safe_load((tmp_path / "site.yaml").read_text())
    site["ray"] = {"address": "auto"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    ours = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path), **variables}
    command = ["run", tmp_path / "pipeline.yaml", "--site", tmp_path / "site.yaml"]
    code, _, errors = finished(vico(*command, extra_environment=ours))
    assert code == 2 and errors.count("\n") == 1
    assert "ray.address=auto: the cluster refuses our token; give its token in RAY_AUTH_TOKEN" in errors
