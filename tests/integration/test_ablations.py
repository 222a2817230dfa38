"""The ablation command on the small real pipeline: it reuses the base, and its figures are theirs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.demo_pipeline import ROOT, STAGES, answer
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.slow


def test_the_command_runs_what_differs_and_compares_it_with_the_base(pipeline, outputs, tmp_path):
    config, site, run = pipeline
    storage = shutil.copytree(Path(run["storage"]), tmp_path / "runs")
    arguments = [config, "--site", site, "--storage", storage, "--only", "floor_large", "--json"]
    command = [sys.executable, "-m", "examples.ablations", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    base, changed = json.loads(done.stdout)["rows"]
    assert (base["name"], changed["name"]) == ("base", "floor_large")
    assert base["run"] == run["run"], "the finished run is only read"
    for row in (base, changed):
        status = {
            stage["name"]: stage for stage in answer("status", row["run"], "--storage", storage)["stages"]
        }
        metrics = json.loads((Path(status["evaluate"]["path"]) / "metrics.json").read_text())
        (point, *_) = [p for p in metrics["routed"] if p["threshold"] == metrics["absolute_threshold"]]
        assert row["tokens_saved"] == point["tokens_saved"] and row["kept"] == point["quality_kept"]
        assert row["auc"] == metrics["router"]["auc"]
    reused = [name for name in STAGES if status[name]["reused"]]
    assert reused == ["shard", "consistency", "ratio"]
    assert 0 < changed["own_seconds"] < changed["seconds"]
