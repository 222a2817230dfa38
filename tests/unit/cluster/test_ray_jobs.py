"""The package for a Ray Jobs server, and the errors about a server that does not answer."""

import os
import subprocess
import sys
import zipfile

import pytest

from cluster.launchers.archive import write_package
from cluster.launchers.ray_jobs import ADDRESS_VARIABLE, RayJobs, pinned_address
from cluster.sources.in_worker import PACKAGES
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


def test_ray_address_does_not_override_the_given_address(monkeypatch):
    from ray.dashboard.utils import get_address_for_submission_client

    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    with pinned_address("http://here:2"):
        assert get_address_for_submission_client("http://here:2") == "http://here:2"
    assert ADDRESS_VARIABLE not in os.environ
