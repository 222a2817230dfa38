"""`vico serve --replicas` on a Ray that outlives its servers: kills, `serve shutdown`, two servers."""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.integration.test_serve import SMALL
from tests.ports import free_port
from tests.served import Served, command_of, get, user
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow
"""A replica imports torch when it starts; other work may take the CPUs."""
ROOT = Path(__file__).parents[2]


@dataclass
class Cluster:
    head: psutil.Process

    def processes(self, words: str) -> dict[int, psutil.Process]:
        """Return the processes of the cluster whose command line has these words, by their id."""
        every = self.head.children(recursive=True)
        return {process.pid: process for process in every if words in command_of(process)}

    def python(self, code: str) -> "subprocess.Popen[str]":
        """Start a program that has joined the cluster."""
        code = f"import ray; ray.init(log_to_driver=False, logging_level=40)\n{code}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as variables,
    ):
        port = free_port()
        variables.setenv("RAY_AUTH_MODE", "token")
        variables.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={port}", f"--temp-dir={folder}", "--disable-usage-stats"]
        command += ["--include-dashboard=false"]
        head = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert any("Ray runtime started" in line for line in head.stdout)
        variables.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        started = psutil.Process(head.pid)
        yield Cluster(started)
        for process in [*started.children(recursive=True), started]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        head.wait()


def served(port: int, *options: str) -> Served:
    return Served(SMALL, "--replicas", "1", "--port", str(port), *options).started()


def answered(server: Served) -> bool:
    return server.ask([user("hello")], max_tokens=2).usage.completion_tokens > 0


def num_replicas(server: Served) -> int:
    return int(get(f"{server.url[:-3]}/health")[1]["replicas"])


def killed(server: Served) -> None:
    server.process.kill()
    server.process.wait()


def test_the_next_server_replaces_what_a_killed_one_left(cluster):
    port = free_port()
    killed(served(port))
    left = cluster.processes("ServeReplica")
    assert len(left) == 1, "Ray Serve's replicas outlive their server"
    server = served(port)
    assert answered(server)
    wait_until(lambda: not left.keys() & cluster.processes("ServeReplica").keys())
    code, errors = server.end()
    assert (code, errors) == (0, "")
    wait_until(lambda: not cluster.processes("ServeReplica"))


def test_replicas_end_by_themselves_when_their_server_is_killed(cluster):
    killed(served(free_port()))
    assert cluster.processes("ServeReplica")
    wait_until(lambda: not cluster.processes("ServeReplica"))


def test_replicas_come_back_after_serve_shutdown_and_a_killed_controller(cluster):
    server = served(free_port())
    [controller] = cluster.processes("ServeController").values()
    os.kill(controller.pid, signal.SIGKILL)
    assert answered(server), "answers do not pass through the controller"
    wait_until(lambda: cluster.processes("ServeController").keys() - {controller.pid})
    wait_until(lambda: num_replicas(server) == 1)
    before = cluster.processes("ServeReplica").keys()
    shutdown = cluster.python("from ray import serve; serve.status(); serve.shutdown()")
    assert shutdown.wait(timeout=PATIENCE_S) == 0, shutdown.stderr.read()
    wait_until(lambda: num_replicas(server) == 1 and not before & cluster.processes("ServeReplica").keys())
    assert answered(server)
    code, errors = server.end()
    assert code == 0
    assert "the replicas were deleted by another program; they are started again" in errors


def test_a_name_belongs_to_one_living_server(cluster):
    hold = """
from pipeline.serving.replicas.lease import lease
with lease("vico-host-8000"):
    print("held", flush=True)
    input()
"""
    first = cluster.python(hold.replace("input()", "import time; time.sleep(300)"))
    try:
        assert first.stdout.readline() == "held\n", first.stderr.read()
        second = cluster.python(hold)
        assert second.wait(timeout=PATIENCE_S) == 1
        assert "vico-host-8000 belong to another `vico serve`, which lives" in second.stderr.read()
    finally:
        first.kill()
        first.wait()
    third = cluster.python(hold.replace("input()", ""))
    assert third.wait(timeout=PATIENCE_S) == 0, third.stderr.read()


def test_ray_shows_the_figures_of_each_replica(cluster):
    server = served(free_port())
    nodes = cluster.python("print('port', ray.nodes()[0]['MetricsExportPort'])")
    output, errors = nodes.communicate(timeout=PATIENCE_S)
    [port] = re.findall(r"port (\d+)", output) or [errors]
    assert answered(server)

    def steps() -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            return re.findall(
                r"ray_vico_engine_step_seconds_count\{.*replica=.*\} [\d.]+", answer.read().decode()
            )

    wait_until(steps)
    server.end()
