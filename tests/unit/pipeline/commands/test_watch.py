"""`vico status --watch`: when it ends."""

import threading
import time

import pytest

from cluster.site import Site
from pipeline.commands.watch import watch
from pipeline.results.runs import Runs
from pipeline.running import jobs
from pipeline.storage.leases import Leases, holder_at_work


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


@pytest.fixture
def done_run(runs):
    run = runs.create(pipeline="p", fingerprints={"shard": "a"}, experiment="e", config={}, site="s")
    run.state = "done"
    runs.save(run)
    return run


def test_watching_ends_when_the_driver_has_let_go_of_the_run(runs, done_run, tmp_path):
    folder, held = runs.run_folder(done_run.run), threading.Event()

    def finish():
        with Leases(runs.storage).acquire(folder, done_run.run):
            held.set()
            time.sleep(1)  # the driver still sends metrics and stops Ray

    driver = threading.Thread(target=finish)
    driver.start()
    held.wait()
    watch(done_run.run, Site(storage=tmp_path))
    assert holder_at_work(folder) is None, "vico gc may follow at once"
    driver.join()


def test_a_driver_that_keeps_its_lease_is_waited_for_a_limited_time(runs, done_run, monkeypatch):
    monkeypatch.setattr(jobs, "STALE_S", 0.5)
    folder = runs.run_folder(done_run.run)
    with Leases(runs.storage).acquire(folder, done_run.run):
        end = jobs.DriverEnd(folder)
        assert not end.has_come()
        time.sleep(0.6)
        assert end.has_come() and holder_at_work(folder) is not None
