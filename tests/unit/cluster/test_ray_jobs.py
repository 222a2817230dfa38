"""The package for a Ray Jobs server, and the errors about a server that does not answer."""

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.launchers.archive import write_package
from cluster.launchers.launcher import Job
from cluster.launchers.ray_jobs import ADDRESS_VARIABLE, RayJobs, pinned_address
from cluster.site import Site
from cluster.sources.in_worker import PACKAGES
from pipeline.running.jobs import job_status
from tests.ports import free_port
from vico.errors import UserError


def test_the_package_has_only_the_sources_and_runs(tmp_path):
    package = tmp_path / "package.zip"
    write_package(package, {"submitted/config.yaml": "seed: 1\n"})
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "job")
    top_folders = {name.partition("/")[0] for name in names}
    assert top_folders == {*PACKAGES, "submitted"}
    assert not [name for name in names if "__pycache__" in name]
    assert package.stat().st_size < 2_000_000, "sources only: no data, no models, no .git"
    command = [sys.executable, "-m", "pipeline.cli", "run", "submitted/other.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=tmp_path / "job", env=environment, capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    assert "submitted/other.yaml does not exist" in process.stderr


def test_the_same_sources_give_the_same_package(tmp_path):
    """Ray names an uploaded package by its bytes and so does not upload the same package twice."""
    for name in ("a.zip", "b.zip"):
        write_package(tmp_path / name, {"x": "y"})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize("address", ["host:8265", "ray://host:10001", "http://"])
def test_a_wrong_address_is_refused(address):
    with pytest.raises(
        UserError, match="is not the address of a Ray Jobs server; write it as http://HOST:8265"
    ):
        RayJobs(address).check()


def test_a_server_that_does_not_answer_is_named():
    port = free_port()
    with pytest.raises(UserError) as error:
        RayJobs(f"http://127.0.0.1:{port}").check()
    assert str(error.value).startswith(
        f"jobs.address=http://127.0.0.1:{port}: no Ray Jobs server answers there"
    )
    assert "\n" not in str(error.value)


@pytest.fixture
def broken_server() -> Iterator[str]:
    """Yield the address of a server that answers as Ray's does when it is asked for its version, breaks the
    connection when it is asked for a job, and has an error for each submission."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/version":
                version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
                self._answer(200, json.dumps(version).encode())
            elif "/packages/" in self.path:
                self._answer(200, b"{}")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(500, b"Traceback: no room for this job")

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_breaks_off_or_refuses_is_one_line(broken_server):
    site = Site(kind="ray", jobs={"address": broken_server})
    for call in (RayJobs.status, RayJobs.logs, RayJobs.cancel):
        with pytest.raises(UserError, match="no Ray Jobs server answers there"):
            call(RayJobs(broken_server, site), "vico-x")
    submission = {"kind": "ray-jobs", "address": broken_server, "id": "vico-x"}
    assert job_status(submission).state == "unknown"
    with pytest.raises(
        UserError, match=r"the server refuses the job \(.*no room for this job.*jobs block"
    ) as error:
        RayJobs(broken_server, site).submit(Job("vico-x", ("run",)))
    assert "\n" not in str(error.value)


def test_ray_address_does_not_override_the_given_address(monkeypatch):
    from ray.dashboard.utils import get_address_for_submission_client

    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    with pinned_address("http://here:2"):
        assert get_address_for_submission_client("http://here:2") == "http://here:2"
    assert ADDRESS_VARIABLE not in os.environ
