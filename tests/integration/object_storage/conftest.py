"""An S3 server behind a faulty proxy, and machines that have their storage on it."""

import pytest

from pipeline.storage.lookup import storage_of
from pipeline.storage.object_store import make_working_copy
from tests import s3_server
from tests.integration.object_project import BUCKET, ObjectProject
from tests.integration.tiny_pipeline.project import TinyProject


@pytest.fixture(scope="module")
def server():
    with s3_server.s3_server() as proxy:
        s3_server.upload(proxy, BUCKET, {})
        yield proxy


@pytest.fixture
def machine(server, tmp_path):
    """Return a function that gives a machine with an empty working copy; all have the same prefix in the
    store."""
    projects = []

    def machine(name="a", **environment):
        projects.append(ObjectProject(tmp_path / name, server, prefix=tmp_path.name, **environment))
        return projects[-1]

    yield machine
    server.fault_of, server.dropped_headers = lambda method, path: None, ()
    for project in projects:
        project.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outputs of a run on a local disk without kills or faults."""
    project = TinyProject(tmp_path_factory.mktemp("undisturbed"))
    project.vico("run")
    return project.outputs()


@pytest.fixture
def two_copies(server, tmp_path, monkeypatch):
    """(storage, folder of a stage) as each of two machines has them."""
    for name, value in s3_server.environment(server, 20).items():
        monkeypatch.setenv(name, value)
    copies = []
    for name in "ab":
        make_working_copy(tmp_path / name, f"s3://{BUCKET}/{tmp_path.name}")
        folder = tmp_path / name / "square" / ("f" * 64)
        folder.mkdir(parents=True)
        copies.append((storage_of(folder), folder))
    return copies
