"""What is packed for a Ray Jobs server, and what is said about one that does not answer."""

import os
import subprocess
import sys
import zipfile

import pytest

from cluster.jobs import ADDRESS_VARIABLE, PACKAGES, JobServer, last_line, the_address, write_package
from tests.ports import free_port
from vico.errors import UserError


def test_the_package_holds_the_sources_alone_and_runs(tmp_path):
    package = tmp_path / "package.zip"
    write_package(package, {"submitted/config.yaml": "seed: 1\n"})
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "job")
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*PACKAGES, "submitted"}
    assert not [name for name in names if "__pycache__" in name]
    assert package.stat().st_size < 2_000_000, "sources only: no data, no models, no .git"
    command = [sys.executable, "-m", "pipeline.cli", "run", "submitted/other.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path / "job", env=environment, capture_output=True, text=True)
    assert (ran.returncode, "submitted/other.yaml does not exist" in ran.stderr) == (2, True), ran.stderr


def test_the_same_sources_give_the_same_package(tmp_path):
    """Ray names an uploaded package by its bytes, so that one that is there is not sent again."""
    for name in ("a.zip", "b.zip"):
        write_package(tmp_path / name, {"x": "y"})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize("address", ["host:8265", "ray://host:10001", "http://"])
def test_what_is_no_address_of_a_jobs_server_is_named(address):
    with pytest.raises(UserError, match="is no address of a Ray Jobs server; write it as http://HOST:8265"):
        JobServer(address)


def test_a_server_that_does_not_answer_is_named_at_once():
    port = free_port()
    with pytest.raises(UserError) as error:
        JobServer(f"http://127.0.0.1:{port}")
    assert str(error.value).startswith(
        f"jobs.address=http://127.0.0.1:{port}: no Ray Jobs server answers there"
    )
    assert "\n" not in str(error.value)


def test_ray_address_does_not_take_the_place_of_the_given_address(monkeypatch):
    from ray.dashboard.utils import get_address_for_submission_client

    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    with the_address("http://here:2"):
        assert get_address_for_submission_client("http://here:2") == "http://here:2"
    assert ADDRESS_VARIABLE not in os.environ


def test_last_line_of_a_message():
    assert last_line("Job failed, last logs:\n\nTraceback\nerror: no such file\n\n") == "error: no such file"
    assert last_line("") == ""
