"""The report of a run in an object store, on a machine that has none of its files."""

from cluster.settings.blocks import Tracking
from cluster.site import Site
from pipeline.report.write import write_report
from pipeline.storage.lookup import storage_of
from pipeline.storage.object_store import make_working_copy
from tests import s3_server
from tests.integration.object_project import BUCKET
from tests.reported_runs import reported_run


def test_a_machine_without_the_files_writes_the_same_report(server, tmp_path, monkeypatch):
    for name, value in s3_server.environment(server, 20).items():
        monkeypatch.setenv(name, value)
    address = f"s3://{BUCKET}/{tmp_path.name}"
    make_working_copy(tmp_path / "a", address)
    run = reported_run(tmp_path / "a")
    site = Site(storage=address, work=tmp_path / "b", tracking=Tracking(enabled=False))
    make_working_copy(site.storage, address)
    storage_of(site.storage).refresh()
    written = write_report(site, run.run, tmp_path / "report.html")
    assert written.missing == ()
    html = written.path.read_text()
    assert address in html and "passes the quality gate" in html
    assert "of stage consistency over 99 steps" in html
