"""Shards on a real S3 server: read like local ones despite faults, a bounded cache, one clear error."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_prep import remote_files as storage
from data_prep.packs.pack import PackBudget
from data_prep.packs.plan import PackPlan, PlanSettings
from data_prep.shards import cache as shard_cache
from data_prep.shards.cache import ShardCache, WrongBytes
from data_prep.shards.folder import contents, manifest
from data_prep.shards.index import load_index
from data_prep.shards.names import shard_name
from data_prep.shards.open_shards import ShardMismatch
from data_prep.shards.reader import SampleReader
from tests.record_tars import write_shard_folder
from tests.s3_server import FAULTS, environment, s3_server, upload
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S
from vico.errors import Unreachable, UserError
from vico.prompt import load_prompt_format

ADDRESS = "s3://shards/set"
NUM_ROWS = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """Sixteen shards of six samples with index and manifest."""
    root = tmp_path_factory.mktemp("shards")
    num_shards = write_shard_folder(root, NUM_ROWS, 6, load_prompt_format(model))
    (root / "manifest.json").write_text(json.dumps(manifest(contents(root, num_shards), {"good": {}})))
    shutil.rmtree(root / "sidecars")
    return root


@pytest.fixture(scope="module")
def server(folder):
    with s3_server() as proxy:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        upload(proxy, "shards", {f"set/{name}": data for name, data in files.items()})
        yield proxy


@pytest.fixture(autouse=True)
def cache(server, monkeypatch, tmp_path):
    """Use the proxy for S3, without faults, and an empty cache folder."""
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VICO_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("data_prep.shards.cache._PAUSE_S", 0.01)
    storage._filesystem_of.cache_clear()
    server.fault, server.faults[:] = lambda number: None, []
    return tmp_path / "cache"


@pytest.mark.parametrize("fault", FAULTS)
def test_remote_shards_give_the_same_samples_as_local_ones(folder, server, model, cache, fault):
    form = load_prompt_format(model)
    local = SampleReader(folder, form)
    server.fault = FAULTS[fault]
    remote = SampleReader(ADDRESS, form)
    for row in random.Random(0).sample(range(NUM_ROWS), NUM_ROWS):
        sample, expected = remote.sample(row), local.sample(row)
        assert (sample.key, sample.tiles_per_image) == (expected.key, expected.tiles_per_image)
        assert np.array_equal(sample.pixels, expected.pixels)
        assert remote.record(row) == local.record(row)
    assert bool(server.faults) == (fault != "none")
    assert len(list(cache.glob("*.tar"))) == 16 and not list(cache.glob("*.partial*"))
    server.fault, num_before = (lambda number: None), server.num_requests
    again = SampleReader(ADDRESS, form)
    keys = [again.sample(row).key for row in range(NUM_ROWS)]
    assert keys == [local.sample(row).key for row in range(NUM_ROWS)]
    assert server.num_requests - num_before < 6, "the manifest and the version of the index, but no shard"


def test_a_plan_opens_at_any_step_without_downloading_a_shard(server, cache):
    budget = PackBudget(reference_tokens=4096, tiles=24, tokens_full=16)
    settings = PlanSettings(budget, packs_per_step=2, seed=1, epoch=0)
    plan = PackPlan(load_index(ADDRESS).columns("train"), settings)
    assert plan.step(plan.num_steps - 1) and not list(cache.glob("*.tar"))


READ_ALL = """
import random, sys
from data_prep.shards.reader import SampleReader
from vico.prompt import load_prompt_format
reader = SampleReader(sys.argv[1], load_prompt_format(sys.argv[2]))
shards = list(range(int(sys.argv[3]) // 6))
for turn in range(2):
    random.Random(f"{sys.argv[4]} {turn}").shuffle(shards)
    for shard in shards:
        for row in range(6 * shard, 6 * shard + 6):
            reader.sample(row)
"""


def bytes_in(cache: Path) -> int:
    """Return the bytes of shards and downloads, each file once, while no process adds or removes files."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "cache.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for path in [*cache.glob("*.partial"), *cache.glob("*.tar")]:
            with suppress(FileNotFoundError):  # a finished download may be renamed in between
                status = path.stat()
                sizes[status.st_ino] = status.st_size
        return sum(sizes.values())


def test_several_processes_keep_the_cache_within_its_limit(folder, model, cache, server):
    # room for the four of the 16 shards that each process has open, and some more
    limit = 11 * max(path.stat().st_size for path in folder.glob("*.tar"))
    command = [sys.executable, "-c", READ_ALL, ADDRESS, str(model), str(NUM_ROWS)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "VICO_SHARD_CACHE_BYTES": str(limit)}
    processes = [subprocess.Popen([*command, str(n)], env=env) for n in range(2)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, bytes_in(cache))
        time.sleep(0.01)
    assert [process.returncode for process in processes] == [0, 0]
    assert limit / 2 < most <= limit and bytes_in(cache) <= limit
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("wrong_bytes", [False, True])
def test_no_file_is_added_or_removed_while_another_process_counts(cache, monkeypatch, wrong_bytes):
    """The other process lists the folder, then reads the sizes: both must find the same files."""
    written, counting = threading.Event(), threading.Event()

    def copied_sha256(address: str, path: Path) -> str:
        digest = real(address, path)
        written.set()
        assert counting.wait(PATIENCE_S)
        return "other" if wrong_bytes else digest

    real = shard_cache._copied_sha256
    monkeypatch.setattr(shard_cache, "_copied_sha256", copied_sha256)
    monkeypatch.setattr(shard_cache, "_DOWNLOADS", 1)
    opened = ShardCache(ADDRESS).opened
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(opened, shard_name(0))
        assert written.wait(PATIENCE_S)
        with open(cache / "cache.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            counting.set()
            with pytest.raises(TimeoutError):
                fetch.result(timeout=0.5)
            assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [".partial"]
        assert isinstance(fetch.exception(PATIENCE_S), WrongBytes if wrong_bytes else type(None))
    assert not list(cache.glob("*.partial")) and bool(list(cache.glob("*.tar"))) != wrong_bytes


def test_a_cache_too_small_for_the_open_shards_is_refused(folder, model, monkeypatch):
    limit = 3 * max(path.stat().st_size for path in folder.glob("*.tar"))
    monkeypatch.setenv("VICO_SHARD_CACHE_BYTES", str(limit))
    reader = SampleReader(ADDRESS, load_prompt_format(model))
    with pytest.raises(UserError, match=f"VICO_SHARD_CACHE_BYTES={limit} leaves no room for a shard of"):
        for row in range(0, NUM_ROWS, 6):
            reader.sample(row)


def test_the_least_recently_used_shard_is_removed_first(folder, model, cache, monkeypatch):
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    monkeypatch.setenv("VICO_SHARD_CACHE_BYTES", str(6 * largest))
    cache.mkdir()
    (cache / f"{'0' * 64}.partial").write_bytes(bytes(largest))  # as a killed process leaves it
    reader = SampleReader(ADDRESS, load_prompt_format(model))
    for shard in (0, 1, 2, 3, 4, 0, 5, 6, 7):
        reader.record(6 * shard)
        used = sum(path.stat().st_size for path in cache.glob("*.tar"))
        assert used <= 6 * largest
    assert not list(cache.glob("*.partial"))
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    kept = {path.stem for path in cache.glob("*.tar")}
    assert {shards[n]["sha256"] for n in (0, 5, 6, 7)} <= kept and shards[1]["sha256"] not in kept


def test_wrong_bytes_a_missing_shard_and_a_dead_server_each_give_one_clear_error(
    folder, server, model, cache, monkeypatch
):
    form, name = load_prompt_format(model), shard_name(2)
    good = (folder / name).read_bytes()
    upload(server, "shards", {f"set/{name}": good[:600] + b"x" + good[601:]})
    try:
        reader = SampleReader(ADDRESS, form)
        with pytest.raises(
            ShardMismatch, match=rf"{ADDRESS}/{name} does not match .*bytes differ.*3 downloads"
        ):
            reader.sample(12)
        assert reader.sample(0).key == "good-00000000"
    finally:
        upload(server, "shards", {f"set/{name}": good})
    assert reader.sample(12).key == "good-00000012", "once it is repaired, it is read"
    assert not list(cache.glob("*.partial"))
    monkeypatch.setenv("VICO_REMOTE_PATIENCE_S", "0.5")
    server.fault = lambda number: "503"
    with pytest.raises(Unreachable, match=rf"{ADDRESS}/{shard_name(5)} could not be read in \d+ tries"):
        reader.sample(30)
    server.fault = lambda number: None
    for address, file in ((f"{ADDRESS}/none", "manifest.json"), ("s3://shards/other", "manifest.json")):
        with pytest.raises(UserError, match=f"has no {file}"):
            load_index(address)
