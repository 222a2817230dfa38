"""A RayJob whose first cluster is lost mid-training: KubeRay makes a second one, and the run continues there.

The API is that of tests/kubernetes; the operator is played, with real Ray clusters of two hosts each.
"""

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launchers.kuberay_config import JOB_MOUNT
from cluster.launchers.rayjob import PACKAGE
from tests.hosts import Host, hosts, needs_hosts
from tests.integration.demo_pipeline import answer, finished, model_files, vico, write_pipeline
from tests.kubernetes.api_server import Cluster, kubernetes_cluster
from tests.kubernetes.operator import Operator, wait_for_job
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.slow, needs_hosts]
NAMES = ("head1", "work1", "head2", "work2")


@pytest.fixture
def machines(tmp_path) -> Iterator[dict[str, Host]]:
    folder = tmp_path / "machines"
    folder.mkdir()
    with hosts(NAMES, folder, private={name: [Path(JOB_MOUNT).parent] for name in NAMES}) as machines:
        yield machines


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Cluster]:
    with kubernetes_cluster(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield cluster


class RayCluster:
    """What KubeRay starts for a RayJob: a head and a worker, by the manifest, and `ray job submit`."""

    def __init__(self, job: dict[str, Any], package: Path, head: Host, worker: Host):
        self.job, self.head, self.worker = job, head, worker
        spec = job["spec"]["rayClusterSpec"]
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_raylet_start_wait_time_s": "180",  # busy machines
            "RAY_worker_niceness": "0",  # 15 by default
            "RAY_TMPDIR": str(Path(JOB_MOUNT).parent),  # each host's own, as in pods
            "RAY_AUTH_MODE": spec["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.environment.pop("PYTHONPATH", None)
        for host in (head, worker):
            host.run("mkdir", "-p", JOB_MOUNT, check=True)
            host.run("cp", package, f"{JOB_MOUNT}/{PACKAGE}", check=True)
        self._start(head, f"--head --port=6379 --node-ip-address={head.address}", spec["headGroupSpec"])
        self._start(worker, f"--address={head.address}:6379", spec["workerGroupSpecs"][0], "--num-cpus=2")

    def _start(self, host: Host, options: str, group: dict[str, Any], more: str = "") -> None:
        """Start Ray with the group's rayStartParams, which KubeRay pastes into a shell command."""
        parameters = " ".join(f"--{name}={text}" for name, text in group["rayStartParams"].items())
        command = f"ray start {options} {parameters} {more} --disable-usage-stats"
        started = host.run("sh", "-c", command, env=self.environment)
        assert started.returncode == 0, started.stdout + started.stderr

    def submit(self) -> subprocess.Popen[str]:
        """Submit the job as KubeRay's submitter pod does, and wait for its end in the background."""
        runtime_env = json.dumps(yaml.safe_load(self.job["spec"]["runtimeEnvYAML"]))
        command = ["ray", "job", "submit", f"--address=http://{self.head.address}:8265"]
        command += [f"--runtime-env-json={runtime_env}", "--"]
        shell = " ".join([*(f"'{word}'" for word in command), self.job["spec"]["entrypoint"]])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return self.head.start("sh", "-c", shell, env=self.environment, **pipes)

    def lose(self) -> None:
        for host in (self.head, self.worker):
            host.kill()


def test_the_second_cluster_continues_the_run_of_the_first(tmp_path, cluster, machines):
    config = write_pipeline(tmp_path)
    pipeline = yaml.safe_load(config.read_text())
    pipeline["consistency"] |= {"epochs": 30, "max_steps": 30}
    config.write_text(yaml.safe_dump(pipeline))
    plain_site = yaml.safe_load((tmp_path / "site.yaml").read_text())
    site = plain_site | {
        "kind": "kuberay",
        "nodes": [{"name": "cpu", "cpus": 2, "memory_gib": 8}],
        "jobs": {"python": sys.executable},
        "kuberay": {"image": "vico:test", "backoff_limit": 1},
    }
    (tmp_path / "kuberay.yaml").write_text(yaml.safe_dump(site))
    on_site, until = ["--site", tmp_path / "kuberay.yaml"], ["--until", "consistency"]

    submitted = answer("submit", config, *on_site, *until)
    run, name = submitted["run"], submitted["submission"]["id"]
    operator = Operator(tmp_path / "kubeconfig")
    job = wait_for_job(operator)
    assert job["metadata"]["name"] == name
    files = operator.core.read_namespaced_config_map(name, "vico")
    package = tmp_path / PACKAGE
    package.write_bytes(base64.b64decode(files.binary_data[PACKAGE]))
    following = vico("logs", "-f", run, *on_site)

    first = RayCluster(job, package, machines["head1"], machines["work1"])
    operator.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    submitter = first.submit()
    checkpoints = tmp_path / "runs" / "consistency"
    try:
        wait_until(lambda: list(checkpoints.glob("*/attempts/1/metrics.jsonl")), submitter)
        metrics = next(checkpoints.glob("*/attempts/1/metrics.jsonl"))
        wait_until(lambda: '"step": 5' in metrics.read_text(), submitter)
    except BaseException:
        first.lose()
        print(submitter.communicate()[0])
        following.kill()
        raise
    first.lose()
    operator.set_status(name, jobDeploymentStatus="Retrying", jobStatus="", failed=1)
    time.sleep(4)
    status = answer("status", run, *on_site)
    assert status["state"] == "pending" and "Retrying; 1 of 2 attempts failed" in status["error"]

    second = RayCluster(job, package, machines["head2"], machines["work2"])
    operator.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    out, _ = second.submit().communicate(timeout=PATIENCE_S)
    operator.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)
    code, followed, err = finished(following)
    assert f"run {run}: done until " in followed.splitlines()[-1], (out, followed, err)
    assert code == 0
    status = answer("status", run, *on_site)
    assert status["state"] == "done"
    assert status["stages"][-1]["attempt"] == 2
    second.lose()

    alone = answer("run", config, "--site", tmp_path / "site.yaml", "--storage", tmp_path / "alone", *until)
    assert alone["state"] == "done"
    weights = [model_files(tmp_path / storage) for storage in ("runs", "alone")]
    assert weights[0]
    assert weights[0] == weights[1], "the lost cluster changed the result"
    code, _, err = finished(vico("audit", run, *on_site))
    assert code == 0, err
