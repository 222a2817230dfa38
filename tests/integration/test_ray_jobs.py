"""A real Ray Jobs server on loopback: submit, follow, status; jobs that die before their driver starts."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.demo_pipeline import finished, vico, write_pipeline
from tests.ports import free_port


@pytest.fixture(scope="module")
def server():
    """The address of a Ray head of our own, with a token that is in the environment of this process."""
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
            deadline = time.monotonic() + 90
            while True:
                assert head.poll() is None and time.monotonic() < deadline, Path(
                    folder, "head.log"
                ).read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", ports["dashboard-port"])) == 0:
                        break
                time.sleep(0.2)
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


@pytest.fixture
def project(tmp_path):
    """A small pipeline, and a way to set fields of its site."""
    path = write_pipeline(tmp_path)

    def with_site(**jobs) -> list[str]:
        site = yaml.safe_load((tmp_path / "site.yaml").read_text())
        site["jobs"] = {"python": sys.executable, **jobs}
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
        return [str(path), "--site", str(tmp_path / "site.yaml"), "--until", "shard"]

    with_site.storage = tmp_path / "runs"
    with_site.site = ["--site", str(tmp_path / "site.yaml")]
    return with_site


def test_a_job_that_never_started_is_submitted_again_and_followed_to_its_end(server, project):
    """The first one dies before its driver starts."""
    code, out, err = finished(vico("submit", *project(address=server, python="/no/such/python"), "--json"))
    assert code == 0, err
    submitted = json.loads(out)
    run = submitted["run"]
    assert submitted["state"] == "pending"
    assert submitted["submission"]["id"].startswith(f"vico-{run}-")
    started = time.monotonic()
    code, followed, err = finished(vico("logs", "-f", run, *project.site), timeout_s=90)
    assert time.monotonic() - started < 80
    assert f"run {run}: failed: job vico-{run}-" in followed
    assert "/no/such/python" in followed
    status = json.loads(finished(vico("status", run, *project.site, "--json"))[1])
    assert status["state"] == "failed"
    assert "/no/such/python" in status["error"]

    # The same command with the mistake mended goes on with the same run.
    arguments = project(address=server)
    code, out, err = finished(vico("submit", *arguments, "--json"))
    assert code == 0, err
    assert json.loads(out)["run"] == run
    submission = json.loads(out)["submission"]
    code, out, err = finished(vico("submit", *arguments))
    assert code == 0, err
    assert "already" in out, "a second submission while the job is there starts nothing"
    code, followed, err = finished(vico("logs", "-f", run, *project.site))
    assert code == 0, err
    assert "shard: done" in followed
    assert followed.rstrip().endswith(f"run {run}: done")

    status = json.loads(finished(vico("status", run, *project.site, "--json"))[1])
    assert (status["state"], [stage["state"] for stage in status["stages"]]) == ("done", ["done"])
    assert status["submission"] == submission, "the job's own run knows that it is its own"
    assert len(json.loads(finished(vico("status", *project.site, "--json"))[1])) == 1
    record = json.loads(Path(status["stages"][0]["path"], "..", "record.json").resolve().read_text())
    from pipeline.identity.provenance import git_state

    assert record["git"]["commit"] == git_state()["commit"], "known though no .git was packed"

    code, out, err = finished(vico("submit", *arguments))
    assert (code, "there is nothing to submit" in out) == (0, True)


def test_without_a_server_one_line_and_nothing_written(project):
    for jobs, message in (
        ({"address": f"http://127.0.0.1:{free_port()}"}, "no Ray Jobs server answers there"),
        ({}, "jobs.address is not set in site test"),
    ):
        code, _, err = finished(vico("submit", *project(**jobs)))
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("error: jobs.address")
        assert message in err
        assert not project.storage.exists()


def test_print_shows_the_job_and_submits_nothing(project):
    code, out, err = finished(vico("submit", *project(address="http://127.0.0.1:1"), "--print"))
    assert code == 0, err
    assert f"entrypoint: {sys.executable} -m pipeline.cli run submitted/config.yaml --site" in out
    assert f"storage: {project.storage}" in out
    assert "samples_per_shard: 32" in out
    assert not project.storage.exists()
