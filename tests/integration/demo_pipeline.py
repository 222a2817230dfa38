"""A small real pipeline for tests: demo records, a random model with 56 px tiles, all stages, two workers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S, wait_for_end

ROOT = Path(__file__).parents[2]
STAGES = ["shard", "consistency", "ratio", "label", "router", "evaluate", "export"]


def write_pipeline(folder: Path) -> Path:
    """Write model, site file and pipeline file to `folder`; return the path of the pipeline file."""
    make_tiny_model(folder / "model")
    site = {
        "name": "test",
        "storage": str(folder / "runs"),
        "train": {"checkpoints": {"every_steps": 3}},
        "tracking": {"interval_s": 0.5},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    pipeline = {
        "seed": 0,
        "experiment": "test",
        "inputs": {
            "records": {"format": "demo", "num_samples": 96, "seed": 0},
            "model": str(folder / "model"),
        },
        "shard": {"samples_per_shard": 32, "max_tiles": 4, "calib_share": 0.2, "test_share": 0.2},
        "consistency": {
            "tiles_per_pack": 16,
            "reference_tokens_per_pack": 512,
            "packs_per_step": 2,
            "epochs": 3,
            "max_steps": 10,
            "validate_every_steps": 5,
            "validation_packs": 2,
            "optimizer": {"learning_rate": 1e-3},
        },
        "router": {"tiles_per_pack": 16, "packs_per_step": 2, "max_steps": 5},
        "evaluate": {"max_new_tokens": 4},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline))
    return path


def vico(*arguments: object, dies: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a new process; with `dies` (POINT:STAGE) it kills itself at that point.

    `extra_environment` sets environment variables; further `options` are those of Popen.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VICO_DIE": dies}
    environment.pop("RAY_ADDRESS", None)
    environment |= options.pop("extra_environment", {})
    module = "tests.integration.planted_deaths" if dies else "pipeline.cli"
    command = [sys.executable, "-m", module, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, env=environment, **options)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a command; return (exit code, standard output, standard error)."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def answer(*arguments: object, **options: Any) -> Any:
    """Run a command with `--json`, which must succeed; return the JSON of its last line."""
    code, out, err = finished(vico(*arguments, "--json", **options))
    assert code == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a driver and to everything that it started (Ray, its workers)."""
    driver = psutil.Process(process.pid)
    family = [driver, *driver.children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    wait_for_end(family)


def model_files(storage: Path, stage: str = "consistency") -> dict[str, bytes]:
    """Return the weights of a stage in a storage, by path in its output."""
    (output,) = (storage / stage).glob("*/output")
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.safetensors")}
