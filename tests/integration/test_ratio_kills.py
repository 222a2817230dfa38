"""The ratio stage after kill -9 of its driver and of actors, with other numbers of actors: the same bits."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.ray_session import ray_session
from data_prep.records.config import RecordsConfig
from stages.ratio.config import RatioConfig
from stages.shard import stage as shard
from tests.integration.demo_pipeline import kill_with_children
from tests.integration.ratio_run import run_ratio
from tests.stage_context import stage_context
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_until
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.errors import UserError

ROOT = Path(__file__).parents[2]
SHARDS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Return shards of demo records, a start model, and a policy that differs from it in all weights."""
    folder = tmp_path_factory.mktemp("ratio")
    model = make_tiny_model(folder / "start")
    records = RecordsConfig(format="demo", num_samples=SHARDS * 12, seed=4)
    context = stage_context("shard", folder, {"records": records, "heldout": None, "tokenizer": model})
    with ray_session(context.site):
        shard.run(shard.ShardConfig(samples_per_shard=12, calib_share=0.2, test_share=0.2), context)
    policy = load_model(model)
    policy.add_compressed_connector(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    save_model(policy.state_dict(), model, folder / "consistency" / "output" / "policy")
    outputs = {name: folder / name / "output" for name in ("shard", "consistency")}
    return {**outputs, "model": model}


def parts_in(store: Path) -> int:
    return len(list((store / "ratio" / "output" / "parts").glob("*.parquet")))


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["tile", "random"])
def test_kills_and_other_numbers_of_actors_change_no_bit(inputs, tmp_path, isolation):
    """The driver of two actors is killed; three actors, of which one is killed, complete its work."""
    config = {"seed": 1, "isolation": isolation} | ({"masks": 8} if isolation == "random" else {})
    whole = run_ratio(inputs, tmp_path / "whole", 1, RatioConfig(**config))
    store = tmp_path / "killed"
    job = {"inputs": {name: str(path) for name, path in inputs.items()}, "store": str(store)}
    (tmp_path / "job.json").write_text(json.dumps({**job, "actors": 2, "config": config}))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.ratio_run", str(tmp_path / "job.json")],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: parts_in(store) >= 2, process)
    finally:
        kill_with_children(process)
    left = parts_in(store)
    assert 2 <= left < SHARDS and not (store / "ratio" / "output" / "ratios.parquet").exists()
    killer = threading.Thread(target=kill_an_actor, args=(store, left + 1), daemon=True)
    killer.start()
    assert run_ratio(inputs, store, 3, RatioConfig(**config), attempt=2) == whole
    killer.join()
    table = pq.read_table(pa.BufferReader(whole))
    assert len(table) > SHARDS * 12 and table["loss_compressed"].to_numpy().min() >= 0


def kill_an_actor(store: Path, num_parts: int) -> None:
    """Kill one actor once there are `num_parts` parts."""
    wait_until(lambda: parts_in(store) >= num_parts, pause_s=0.002)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("ray::") and "Actor" in "".join(child.cmdline()):
                child.kill()
                return


def test_losses_that_overflow_end_the_stage_with_the_sample(inputs, tmp_path):
    policy = load_model(inputs["consistency"] / "policy")
    with torch.no_grad():
        policy.base.model.language_model.norm.weight.fill_(float("inf"))
    save_model(policy.state_dict(), inputs["model"], tmp_path / "consistency" / "output" / "policy")
    broken = {**inputs, "consistency": tmp_path / "consistency" / "output"}
    with pytest.raises(UserError, match=r"^sample .* losses are not finite; check the policy"):
        run_ratio(broken, tmp_path / "store", 1, RatioConfig(seed=1, max_samples=3))
    assert not list((tmp_path / "store").rglob("*.parquet"))
