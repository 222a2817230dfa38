"""The node sampler: what it measures, and that it survives kills and errors."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import node_metrics
from cluster.node_metrics import NodeSampler
from tests.waiting import wait_until


def samples_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def sampled_file(folder: Path, num_samples: int) -> Path:
    """Run a sampler until it has written `num_samples`; return its file."""
    with NodeSampler(folder, interval_s=0.02, node="n 1") as sampler:
        wait_until(lambda: num_lines(sampler.path) >= num_samples)
    return sampler.path


def test_samples_are_numbered_and_name_the_node(tmp_path):
    path = sampled_file(tmp_path / "attempts" / "1", 3)
    assert path.name == "system-n_1.jsonl"
    samples = samples_in(path)
    assert [sample["step"] for sample in samples] == list(range(len(samples)))
    metrics = samples[-1]["metrics"]
    assert 0 < metrics["system/n_1/system_memory_usage_percentage"] <= 100
    assert metrics["system/n_1/process_tree_memory_megabytes"] > 5
    assert metrics["system/n_1/network_receive_megabytes"] >= 0


def test_steps_continue_over_attempts_and_after_an_incomplete_line(tmp_path):
    first = sampled_file(tmp_path / "attempts" / "1", 2)
    last_step = samples_in(first)[-1]["step"]
    with first.open("a") as file:
        file.write('{"step": 9999, "ti')  # killed while it wrote
    second = sampled_file(tmp_path / "attempts" / "2", 1)
    assert samples_in(second)[0]["step"] == last_step + 1


def test_two_samplers_of_a_node_write_one_series(tmp_path):
    with NodeSampler(tmp_path / "1", interval_s=0.02, node="n") as sampler:
        wait_until(lambda: num_lines(sampler.path) > 0)
        with NodeSampler(tmp_path / "1", interval_s=0.02, node="n"):
            time.sleep(0.2)
    steps = [sample["step"] for sample in samples_in(sampler.path)]
    assert steps == list(range(len(steps)))


def test_a_failing_measurement_is_logged_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    failures = []

    def broken():
        failures.append("no /proc")
        raise OSError("no /proc")

    monkeypatch.setattr(node_metrics.psutil, "virtual_memory", broken)
    with NodeSampler(tmp_path / "1", interval_s=0.01, node="n"):
        wait_until(lambda: len(failures) >= 3)
    assert [record.getMessage() for record in caplog.records] == [
        "no system metrics from n for now: no /proc"
    ]


class NVMLError_NotSupported(Exception):
    pass


class Nvml:
    """Stands in for the module pynvml. The second of its two GPUs is split into instances: no utilization."""

    NVMLError_NotSupported = NVMLError_NotSupported

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):
        return type("Memory", (), {"used": 5e9, "total": 20e9})

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle == 1:
            raise NVMLError_NotSupported
        return type("Rates", (), {"gpu": 40})


def test_gpus_of_a_node(monkeypatch):
    """NVML itself needs a GPU."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert node_metrics.Gpus().sample() == {
        "gpu_0_memory_usage_megabytes": 5000,
        "gpu_0_memory_usage_percentage": 25,
        "gpu_0_utilization_percentage": 40,
        "gpu_1_memory_usage_megabytes": 5000,
        "gpu_1_memory_usage_percentage": 25,
    }


@pytest.mark.cuda
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no NVIDIA driver")
def test_gpus_of_this_node():
    assert 0 <= node_metrics.Gpus().sample()["gpu_0_memory_usage_percentage"] <= 100
