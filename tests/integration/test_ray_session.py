"""A local Ray's life: environment of its workers, kill of its driver, wrong addresses, ports in use."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest

from cluster.site import Site
from vico.errors import UserError

ROOT = Path(__file__).parents[2]


def driver(code: str, **environment: str) -> subprocess.Popen:
    """A python process of its own, since a process has one Ray."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    variables.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def short_folder():
    """Ray's sockets allow no long path, such as pytest's."""
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_session_gives_workers_their_environment_and_leaves_nothing(tmp_path, short_folder):
    code = f"""
        import os, signal
        from cluster.ray_session import ray_session
        from cluster.site import Site
        from cluster.tasks import map_tasks
        site = Site.model_validate({{"ray": {{"temp_dir": {str(short_folder)!r}}}}})
        handler = lambda *a: None
        signal.signal(signal.SIGTERM, handler)
        names = ["OMP_NUM_THREADS", "DS_ACCELERATOR", "MLFLOW_RUN_ID", "RAY_USAGE_STATS_ENABLED"]
        names.append("CUDA_VISIBLE_DEVICES")
        def environment(_):
            import vico.errors
            return [os.environ.get(name) for name in names]
        with ray_session(site):
            with ray_session(site):
                print(dict(map_tasks(environment, [0], site=site))[0])
            print(dict(map_tasks(abs, [-1], site=site)))
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
        with ray_session(site):
            print(dict(map_tasks(abs, [-2], site=site)))
        print(os.listdir(site.ray.temp_dir))
    """
    home = tmp_path / "home"
    home.mkdir()
    process = driver(code, MLFLOW_RUN_ID="parent", HOME=str(home))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.splitlines()[-4:] == ["['1', 'cpu', '', '0', '']", "{0: 1}", "{0: 2}", "[]"]
    assert not (home / ".ray").exists(), "no token may be left in the home folder"


def is_agent(process: psutil.Process) -> bool:
    """One of Ray's two agents, by its title or, before it has given itself one, by its program."""
    words = [process.name(), *process.cmdline()]
    return any("Agent" in word or word.endswith(("agent.py", "agent/main.py")) for word in words)


def test_ray_goes_when_its_driver_is_killed(short_folder):
    code = f"""
        import time
        from cluster.ray_session import ray_session
        from cluster.site import Site
        from cluster.tasks import map_tasks
        site = Site.model_validate({{"ray": {{"temp_dir": {str(short_folder)!r}}}}})
        with ray_session(site):
            for _ in map_tasks(lambda item: item or time.sleep(600), [1, 0], site=site):
                print("one done", flush=True)
    """
    process = driver(code)
    line = "\n"
    while line and line != "one done\n":
        line = process.stdout.readline()
    assert line, "the driver ended before its first task"
    started = psutil.Process(process.pid).children(recursive=True)
    agents = [child for child in started if is_agent(child)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    others = [child for child in started if child not in agents]
    assert len(others) >= 4, "GCS, raylet and workers"
    # A worker that was just starting asks the dead cluster until Ray gives up (26 s seen, 60 s at most).
    _, alive = psutil.wait_procs(others, timeout=90)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    # Ray's agents, which hold nothing, first try for a minute to tell the dead cluster of it.
    for agent in agents:
        agent.kill()
    assert len(list(short_folder.glob("vico-ray-*"))) == 1
    follower = driver(code.replace("[1, 0]", "[1]"))
    assert follower.wait(timeout=120) == 0
    assert list(short_folder.glob("vico-ray-*")) == [], "the next session clears what the killed one left"


@pytest.fixture
def ray_session(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from cluster.ray_session import ray_session

    return ray_session


def refusal(ray_session, settings: dict) -> str:
    with pytest.raises(UserError) as error, ray_session(Site.model_validate(settings)):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_port_in_use_is_named(ray_session):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refusal(ray_session, {"ray": {"dashboard": True, "dashboard_port": port}})
    assert message.startswith(f"ray.dashboard_port={port}: the port is in use")


def test_addresses_without_a_cluster_are_named(ray_session, monkeypatch):
    message = refusal(ray_session, {"ray": {"address": "127.0.0.1:9"}})
    assert message.startswith("ray.address=127.0.0.1:9: no Ray cluster answers there")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    message = refusal(ray_session, {})
    assert message.startswith(
        "RAY_ADDRESS=http://127.0.0.1:8265 is no address of a cluster (HOST:PORT, or auto)"
    )
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert refusal(ray_session, {}).startswith("RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there")


def test_a_local_ray_too_small_for_the_site_is_named(ray_session):
    message = refusal(ray_session, {"jobs": {"address": "http://host"}, "resources": {"workers": 64}})
    assert message.startswith("site local: resources.workers=64")


def test_an_unusable_temporary_folder_is_named(ray_session):
    assert "is too long for Ray's sockets" in refusal(ray_session, {"ray": {"temp_dir": "/tmp/" + "a" * 100}})
    assert "cannot be written" in refusal(ray_session, {"ray": {"temp_dir": "/proc/nothing"}})
