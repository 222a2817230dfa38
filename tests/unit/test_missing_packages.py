"""What needs a package of an extra says how to install it, with the versions that were tested."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.launchers.kubernetes_api import connected
from data_prep.demo.sources import package_folder
from data_prep.remote_files import _filesystem_of
from pipeline.storage.bucket import Bucket
from vico.errors import UserError

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = {line.partition("==")[0] for line in CONSTRAINTS if "==" in line}


def assert_says_how(message: str, needed_by: str, package: str) -> None:
    command = f"pip install --constraint constraints.txt {package}"
    assert message == f"{needed_by} needs the package {package}; install it: {command}"
    assert package in PINNED


@pytest.mark.parametrize(
    "needed_by, package, module, use",
    [
        ("storage=s3://a/b", "botocore", "botocore.config", lambda: Bucket("s3://a/b").client),
        ("gs://", "gcsfs", "gcsfs", lambda: _filesystem_of.__wrapped__("gs", 0)),
        ("s3://", "s3fs", "s3fs", lambda: _filesystem_of.__wrapped__("s3", 0)),
        ("kind: kuberay", "kubernetes", "kubernetes", lambda: connected(None)),
    ],
)
def test_the_package_of_an_address_or_a_cluster(monkeypatch, needed_by, package, module, use):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ModuleNotFoundError
    with pytest.raises(UserError) as raised:
        use()
    assert_says_how(str(raised.value), needed_by, package)


def test_the_demo_names_the_package_that_has_a_module(monkeypatch):
    monkeypatch.setattr("data_prep.demo.sources.find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        package_folder.__wrapped__("skimage")
    assert_says_how(str(raised.value), "the demo", "scikit-image")


REPLICAS = [("grpc_reflection", "grpcio-reflection"), ("grpc", "grpcio"), ("ray.serve", "ray")]


@pytest.mark.parametrize("module, package", REPLICAS)
def test_replicas_need_a_package_that_ray_serve_imports(module, package):
    """In a process of its own: in this one Ray Serve may be imported already."""
    code = """
import sys
from types import SimpleNamespace
sys.modules[sys.argv[1]] = None
from pipeline.serving.server import _engine
try:
    with _engine(None, SimpleNamespace(), SimpleNamespace(replicas=2), None, 0):
        pass
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""
    command = [sys.executable, "-c", code, module]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    name, _, message = done.stdout.strip().partition(": ")
    assert name == "UserError", done.stdout + done.stderr
    assert_says_how(message, "--replicas", package)
