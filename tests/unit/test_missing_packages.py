"""What needs a package of an extra says how to install it, with the versions that were tested."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.demo.sources import package_folder
from tests.waiting import PATIENCE_S
from vico.errors import UserError

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = {line.partition("==")[0] for line in CONSTRAINTS if "==" in line}


def assert_says_how(message: str, needed_by: str, package: str) -> None:
    command = f"pip install --constraint constraints.txt {package}"
    assert message == f"{needed_by} needs the package {package}; install it: {command}"
    assert package in PINNED


def error_without(module: str, imports: str, use: str) -> str:
    """Return the error that the statement `use` ends with where a module is not installed.

    In a process of its own: in this one a library may have loaded the module already.
    """
    code = f"""
import sys
sys.modules[{module!r}] = None  # importing it raises ModuleNotFoundError
{imports}
try:
    {use}
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=PATIENCE_S)
    name, _, message = done.stdout.strip().partition(": ")
    assert name == "UserError", done.stdout + done.stderr
    return message


BUCKET = ("from pipeline.storage.bucket import Bucket", "Bucket('s3://a/b').client")
REMOTE = ("from data_prep.remote_files import _filesystem_of", "_filesystem_of({!r}, 0)")
KUBERNETES = ("from cluster.launchers.kubernetes_api import connected", "connected(None)")


@pytest.mark.parametrize(
    "needed_by, package, module, use",
    [
        ("storage=s3://a/b", "botocore", "botocore.config", BUCKET),
        ("gs://", "gcsfs", "gcsfs", (REMOTE[0], REMOTE[1].format("gs"))),
        ("s3://", "s3fs", "s3fs", (REMOTE[0], REMOTE[1].format("s3"))),
        ("kind: kuberay", "kubernetes", "kubernetes", KUBERNETES),
    ],
)
def test_the_package_of_an_address_or_a_cluster(needed_by, package, module, use):
    assert_says_how(error_without(module, *use), needed_by, package)


def test_the_demo_names_the_package_that_has_a_module(monkeypatch):
    monkeypatch.setattr("data_prep.demo.sources.find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        package_folder.__wrapped__("skimage")
    assert_says_how(str(raised.value), "the demo", "scikit-image")


REPLICAS = [("grpc_reflection", "grpcio-reflection"), ("grpc", "grpcio"), ("ray.serve", "ray")]


@pytest.mark.parametrize("module, package", REPLICAS)
def test_replicas_need_a_package_that_ray_serve_imports(module, package):
    imports = """
from types import SimpleNamespace
from pipeline.serving.server import _engine"""
    use = "_engine(None, SimpleNamespace(), SimpleNamespace(replicas=2), None, 0).__enter__()"
    assert_says_how(error_without(module, imports, use), "--replicas", package)
