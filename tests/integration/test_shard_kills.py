"""The shard stage after kill -9 of the driver or of workers: the same bytes as an undisturbed run."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.ray_session import ray_session
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from tests.integration.demo_pipeline import kill_with_children
from tests.integration.shard_run import context_of, files, internvl, site_with
from tests.record_files import write_good_records, write_sharing_records
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def ray_up():
    with ray_session(site_with(2)):
        yield


def test_a_killed_run_that_resumes_gives_the_bytes_of_an_undisturbed_run(tmp_path, model, ray_up):
    meta = write_good_records(tmp_path / "records", num_rows=120)
    config = {"samples_per_shard": 3}
    run(ShardConfig(**config), context_of(tmp_path / "whole", model, internvl(meta)))
    folder = tmp_path / "killed"
    job = {"meta": str(meta), "model": str(model), "folder": str(folder), "config": config}
    (tmp_path / "job.json").write_text(json.dumps(job))
    process = started(tmp_path / "job.json")
    try:
        wait_until(lambda: len(list(folder.glob("output/sidecars/*.tar"))) >= 4, process, pause_s=0.005)
    finally:
        kill_with_children(process)  # without a lease nothing would stop a worker that outlives it
    left = list(folder.glob("output/**/*.tar"))
    assert not (folder / "output" / "manifest.json").exists() and 4 <= len(left) < 40
    run(ShardConfig(**config), context_of(folder, model, internvl(meta), attempt=2))
    after = {name: data for name, data in files(folder).items() if ".partial-1" not in name}
    assert after == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_while_rows_change_side_changes_nothing(tmp_path, model, ray_up):
    """kill -9 of the driver after some shards have a new sidecar."""
    meta, num_rows = write_sharing_records(tmp_path / "records", num_rows=240)
    config = {"samples_per_shard": 3}
    run(ShardConfig(**config), context_of(tmp_path / "whole", model, internvl(meta)))
    folder = tmp_path / "killed"
    job = {"meta": str(meta), "model": str(model), "folder": str(folder), "config": config}
    (tmp_path / "job.json").write_text(json.dumps(job))
    process = started(tmp_path / "job.json")
    try:
        kept = "output/sidecars/*.kept.parquet"
        wait_until(lambda: len(list(folder.glob(kept))) >= 3, process, pause_s=0.001)
    finally:
        kill_with_children(process)
    assert not (folder / "output" / "manifest.json").exists()
    counts = run(ShardConfig(**config), context_of(folder, model, internvl(meta), attempt=2))
    assert counts["written"] == num_rows
    after = {name: data for name, data in files(folder).items() if ".partial-1" not in name}
    assert after == files(tmp_path / "whole")


def started(job: Path) -> subprocess.Popen[bytes]:
    """Start the shard stage of a job file in a process of its own."""
    command = [sys.executable, "-m", "tests.integration.shard_run", str(job)]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=root, env=environment | {"PYTHONPATH": str(root)})


def test_a_killed_worker_changes_nothing(tmp_path, model, ray_up, caplog):
    """After kill -9 of the processes that write shards, tasks are retried and give the same bytes."""
    meta = write_good_records(tmp_path / "records", num_rows=120)
    config = ShardConfig(samples_per_shard=3)
    run(config, context_of(tmp_path / "whole", model, internvl(meta)))
    folder, at_work = tmp_path / "killed", "its worker died, trying again"

    def kill_workers() -> None:
        for number in (4, 12, 20):  # a worker killed between two shards has no task to retry
            wait_until(lambda n=number: len(list(folder.glob("output/sidecars/*.tar"))) >= n, pause_s=0.005)
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = "".join(process.cmdline())
                    if title.startswith("ray::") and "gent" not in title:
                        process.kill()
            time.sleep(0.5)
            if at_work in caplog.text:
                return

    killer = threading.Thread(target=kill_workers, daemon=True)
    killer.start()
    run(config, context_of(folder, model, internvl(meta)))
    killer.join()
    assert at_work in caplog.text and files(folder) == files(tmp_path / "whole")
