"""The node sampler: what it measures, and that it survives kills and errors."""

import json
import shutil
import time

import pytest

from cluster import node_metrics
from cluster.node_metrics import NodeSampler


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(folder, num_samples):
    with NodeSampler(folder, interval_s=0.02, node="n 1") as sampler:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if sampler.path.exists() and sampler.path.read_text().count("\n") >= num_samples:
                break
            time.sleep(0.01)
    return sampler.path


def test_samples_are_numbered_and_name_the_node(tmp_path):
    path = sampled(tmp_path / "attempts" / "1", 3)
    assert path.name == "system-n_1.jsonl"
    samples = lines(path)
    assert [sample["step"] for sample in samples] == list(range(len(samples)))
    metrics = samples[-1]["metrics"]
    assert 0 < metrics["system/n_1/system_memory_usage_percentage"] <= 100
    assert metrics["system/n_1/process_tree_memory_megabytes"] > 5
    assert metrics["system/n_1/network_receive_megabytes"] >= 0


def test_samples_go_on_over_attempts_and_after_half_a_line(tmp_path):
    first = sampled(tmp_path / "attempts" / "1", 2)
    last = lines(first)[-1]["step"]
    with first.open("a") as file:
        file.write('{"step": 9999, "ti')  # killed while it wrote
    assert lines(sampled(tmp_path / "attempts" / "2", 1))[0]["step"] == last + 1


def test_two_samplers_of_a_node_give_one_series(tmp_path):
    with NodeSampler(tmp_path / "1", interval_s=0.02, node="n"):
        path = tmp_path / "1" / "system-n.jsonl"
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        with NodeSampler(tmp_path / "1", interval_s=0.02, node="n"):
            time.sleep(0.2)
    steps = [sample["step"] for sample in lines(path)]
    assert steps == list(range(len(steps)))


def test_a_failing_measure_is_logged_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    def broken():
        raise OSError("no /proc")

    monkeypatch.setattr(node_metrics.psutil, "virtual_memory", broken)
    with NodeSampler(tmp_path / "1", interval_s=0.01, node="n"):
        time.sleep(0.2)
    assert [record.getMessage() for record in caplog.records] == [
        "no system metrics from n for now: no /proc"
    ]


def test_gpus_of_a_node(monkeypatch):
    """How NVML answers are read; NVML itself needs a GPU. The second GPU is cut in parts and has no rate."""

    class NVMLError_NotSupported(Exception):
        pass

    class Nvml:
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

    nvml = Nvml()
    nvml.NVMLError_NotSupported = NVMLError_NotSupported
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
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
