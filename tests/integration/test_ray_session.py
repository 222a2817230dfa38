"""Ray sessions: environment of the workers, kill of the driver, wrong addresses, ports in use."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.site import Site
from tests.waiting import PATIENCE_S, wait_for_end
from vico.errors import UserError

ROOT = Path(__file__).parents[2]


def driver(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start a python process for the code: a process can have one Ray only."""
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
def short_folder() -> Iterator[Path]:
    """A folder with a short path: Ray's sockets do not allow one as long as pytest's."""
    with tempfile.TemporaryDirectory(prefix="v-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_session_sets_the_environment_of_workers_and_leaves_no_files(tmp_path, short_folder):
    code = f"""
        import os, signal
        from cluster.ray_session import ray_session
        from cluster.site import Site
        from cluster.tasks import map_tasks
        site = Site.model_validate({{"ray": {{"temp_dir": {str(short_folder)!r}}}}})
        handler = lambda *a: None
        signal.signal(signal.SIGTERM, handler)
        names = ["OMP_NUM_THREADS", "DS_ACCELERATOR", "MLFLOW_RUN_ID", "RAY_USAGE_STATS_ENABLED"]
        names += ["CUDA_VISIBLE_DEVICES", "MALLOC_TRIM_THRESHOLD_"]
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
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert output.splitlines()[-4:] == ["['1', 'cpu', '', '0', '', '1073741824']", "{0: 1}", "{0: 2}", "[]"]
    assert not (home / ".ray").exists(), "a token was left in the home folder"


def is_agent(process: psutil.Process) -> bool:
    """Return whether this is one of Ray's two agents, by its title or, before it has one, its program."""
    words = [process.name(), *process.cmdline()]
    return any("Agent" in word or word.endswith(("agent.py", "agent/main.py")) for word in words)


def test_ray_ends_when_its_driver_is_killed(short_folder):
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
    children = psutil.Process(process.pid).children(recursive=True)
    agents = [child for child in children if is_agent(child)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    others = [child for child in children if child not in agents]
    assert len(others) >= 4, "GCS, raylet and workers"
    [folder] = short_folder.glob("vico-ray-*")
    assert (folder / "r").is_dir() and list(folder.glob("r/session_*/sockets/*"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "no other user reaches the sockets and logs in it"
    # A worker that was just starting asks the dead cluster until Ray gives up (26 s measured, 60 s at most).
    wait_for_end(others)
    # The agents hold no resources; they try for a minute to report to the dead cluster before they end.
    for agent in agents:
        agent.kill()
    assert len(list(short_folder.glob("vico-ray-*"))) == 1
    follower = driver(code.replace("[1, 0]", "[1]"))
    assert follower.wait(timeout=PATIENCE_S) == 0
    assert list(short_folder.glob("vico-ray-*")) == [], "the next session removes the old folder"


@pytest.fixture
def ray_session(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from cluster.ray_session import ray_session

    return ray_session


def refusal(ray_session, settings: dict[str, Any]) -> str:
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
    assert message.startswith("ray.address=127.0.0.1:9: no Ray cluster answers there (")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    message = refusal(ray_session, {})
    assert message.startswith(
        "RAY_ADDRESS=http://127.0.0.1:8265 is not the address of a cluster (HOST:PORT, or auto)"
    )
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert refusal(ray_session, {}).startswith("RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there")


def test_a_local_ray_too_small_for_the_site_is_named(ray_session):
    message = refusal(ray_session, {"jobs": {"address": "http://host"}, "resources": {"workers": 64}})
    assert message.startswith("site local: resources.workers=64")


def test_an_unusable_temporary_folder_is_named(ray_session):
    assert "is too long for Ray's sockets" in refusal(ray_session, {"ray": {"temp_dir": "/tmp/" + "a" * 100}})
    assert "is not writable" in refusal(ray_session, {"ray": {"temp_dir": "/proc/nothing"}})


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def web_server() -> Iterator[int]:
    with ThreadingHTTPServer(("", 0), SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("source", ["RAY_ADDRESS", "ray.address"])
def test_servers_that_are_no_cluster_are_named(ray_session, monkeypatch, source, silent_server, web_server):
    for port, reason in (
        (silent_server, "no answer within 1 s"),
        (web_server, "nothing listens there, or another server"),
    ):
        monkeypatch.setattr("cluster.ray_start.address._ANSWER_TIMEOUT_S", 1.0)
        address = f"127.0.0.1:{port}"
        if source == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
        settings = {} if source == "RAY_ADDRESS" else {"ray": {"address": address}}
        assert refusal(ray_session, settings).startswith(
            f"{source}={address}: no Ray cluster answers there ({reason}); give HOST:PORT"
        )


@pytest.mark.parametrize("address", ["host", "host:", ":6379", "host:port", "host:99999", "ray://host:10001"])
def test_malformed_addresses_are_named(ray_session, address):
    message = refusal(ray_session, {"ray": {"address": address}})
    assert message.startswith(f"ray.address={address} is not the address of a cluster (HOST:PORT, or auto)")


def test_other_ports_of_a_cluster_are_named(short_folder):
    """The raylet's port speaks gRPC too, the agent's HTTP."""
    code = f"""
        import os, ray
        from cluster.ray_start.address import refuse_no_cluster
        from cluster.ray_session import ray_session
        from cluster.site import Site
        from vico.errors import UserError
        with ray_session(Site.model_validate({{"ray": {{"temp_dir": {str(short_folder)!r}}}}})):
            (node,) = ray.nodes()
            for name in ("NodeManagerPort", "RuntimeEnvAgentPort", "MetricsExportPort"):
                try:
                    refuse_no_cluster("ray.address", f"127.0.0.1:{{node[name]}}")
                except UserError as error:
                    print(error)
            refuse_no_cluster("ray.address", ray.get_runtime_context().gcs_address)
            print("the cluster itself answers")
    """
    process = driver(code)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    *refused, accepted = output.splitlines()[-4:]
    assert all("no Ray cluster answers there (" in line for line in refused), output
    assert accepted == "the cluster itself answers"


@pytest.mark.slow  # waits up to a minute for Ray's own limits
@pytest.mark.parametrize("program, missing", [("gcs_server", "its GCS server"), ("raylet", "its raylet")])
def test_a_start_that_takes_too_long_is_one_line_and_keeps_the_logs(short_folder, program, missing):
    """The program is stopped as soon as it runs, as if the machine had no time for it."""
    code = f"""
        import os, threading, psutil, ray
        from cluster.ray_session import ray_session
        from cluster.site import Site
        from vico.errors import UserError

        def stop_program():
            stopped = False
            while not stopped:
                for process in psutil.Process().children(recursive=True):
                    try:
                        if os.path.basename(process.exe()) == {program!r} and not stopped:
                            process.suspend()
                            stopped = True
                    except psutil.Error:
                        continue

        threading.Thread(target=stop_program, daemon=True).start()
        settings = {{"temp_dir": {str(short_folder)!r}, "start_timeout_s": 10}}
        try:
            with ray_session(Site.model_validate({{"ray": settings}})):
                print("started")
        except UserError as error:
            print(error)
    """
    process = driver(code)
    output, _ = process.communicate(timeout=PATIENCE_S)
    # A GCS server that was stopped after it had answered hangs Ray's own code, so our watch ends the driver.
    (line,) = [line for line in output.splitlines() if "a local Ray did not start: " in line]
    assert line.split("a local Ray did not start: ")[1].startswith(f"{missing} was not ready after "), output
    assert "; raise ray.start_timeout_s=10 in the site if the machine is slow; its logs are in " in line
    left = [process for process in psutil.process_iter(["cmdline"]) if uses(process, short_folder)]
    wait_for_end(left)
    (kept,) = short_folder.iterdir()
    assert line.endswith(str(kept))
    assert list(kept.glob("session_*"))


def uses(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in argument for argument in process.info["cmdline"] or ())


@pytest.mark.parametrize(
    "act, reason",
    [("suspend", "its raylet was not ready after "), ("kill", "its GCS server has ended; its logs are in ")],
)
def test_a_server_that_is_lost_during_the_start_is_one_line(short_folder, act, reason):
    """It has answered before: Ray's own calls then wait for a minute and end the process."""
    code = f"""
        import os, threading, psutil, ray
        from cluster.ray_session import ray_session
        from cluster.site import Site

        def lose_server():
            while True:
                programs = dict()
                for process in psutil.Process().children(recursive=True):
                    try:
                        programs[os.path.basename(process.exe())] = process
                    except psutil.Error:
                        continue
                if "raylet" in programs:
                    programs["gcs_server"].{act}()
                    return

        threading.Thread(target=lose_server, daemon=True).start()
        settings = {{"temp_dir": {str(short_folder)!r}, "start_timeout_s": 5}}
        with ray_session(Site.model_validate({{"ray": settings}})):
            print("started")
    """
    process = driver(code)
    output, _ = process.communicate(timeout=PATIENCE_S)
    (line,) = [line for line in output.splitlines() if "a local Ray did not start: " in line]
    assert line.split("a local Ray did not start: ")[1].startswith(reason), output
    (kept,) = short_folder.iterdir()
    assert line.endswith(str(kept))
    assert list(kept.glob("session_*/gcs_server.*"))


@pytest.mark.parametrize("times", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_a_raylet_that_ends_during_the_start_is_started_again(short_folder, times):
    """As it does if its agents take more than 15 s on a busy machine."""
    code = f"""
        import os, threading, psutil, ray
        from cluster.ray_session import ray_session
        from cluster.site import Site

        def lose_raylets():
            lost = set()
            while len(lost) < {times}:
                for process in psutil.Process().children(recursive=True):
                    try:
                        if os.path.basename(process.exe()) == "raylet" and process.pid not in lost:
                            process.kill()
                            lost.add(process.pid)
                    except psutil.Error:
                        continue

        threading.Thread(target=lose_raylets, daemon=True).start()
        with ray_session(Site.model_validate({{"ray": {{"temp_dir": {str(short_folder)!r}}}}})):
            print(ray.get(ray.remote(lambda: "started").remote()))
    """
    process = driver(code)
    output, _ = process.communicate(timeout=PATIENCE_S)
    if times == 1:
        assert output.splitlines()[-1:] == ["started"], output
        assert list(short_folder.iterdir()) == []
        return
    (line,) = [line for line in output.splitlines() if "a local Ray did not start: " in line]
    assert "did not start: its raylet has ended in each of 3 starts; its logs are in " in line
    (kept,) = short_folder.iterdir()
    assert line.endswith(str(kept)) and len(list(kept.glob("session_*"))) == 3


@pytest.mark.slow
def test_a_start_that_takes_longer_than_rays_own_limit_succeeds(short_folder):
    """The raylet is stopped for 35 s; Ray alone gives up after 30."""
    code = f"""
        import os, threading, time, psutil, ray
        from cluster.ray_session import ray_session
        from cluster.site import Site

        def delay_raylet():
            while True:
                for process in psutil.Process().children(recursive=True):
                    try:
                        if os.path.basename(process.exe()) == "raylet":
                            process.suspend()
                            time.sleep(35)
                            process.resume()
                            return
                    except psutil.Error:
                        continue

        threading.Thread(target=delay_raylet, daemon=True).start()
        with ray_session(Site.model_validate({{"ray": {{"temp_dir": {str(short_folder)!r}}}}})):
            print("started")
    """
    process = driver(code)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert output.splitlines()[-1:] == ["started"], output
