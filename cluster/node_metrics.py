"""What this machine does while a stage runs: CPU, memory, disk, network and GPUs, sampled by a thread.

The first rank on each node of a training starts one; each sample is a line of the attempt's
`system-<node>.jsonl`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import platform
import re
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

logger = logging.getLogger(__name__)
MEGABYTE = 1e6


class NodeSampler:
    """Samples the node every `interval_s` seconds between `start` and `stop`, the first at once.

    Steps go on from the stage's earlier attempts, so that the samples of all attempts are one series.
    The names are those of MLflow's system metrics. A sample that fails is logged and left out. Of several
    samplers of one node and attempt, one writes.
    """

    def __init__(self, attempt_folder: Path, *, interval_s: float = 10.0, node: str | None = None) -> None:
        self.node = re.sub(r"[^\w.-]", "_", node or platform.node() or "node")
        self.path = attempt_folder / f"system-{self.node}.jsonl"
        self.interval_s = interval_s
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.sample_until_stopped, name="node-metrics", daemon=True)
        self.gpus = Gpus()
        self.network_at_start = psutil.net_io_counters()

    def start(self) -> None:
        psutil.cpu_percent()  # the first call has nothing to compare with and gives 0
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join(timeout=10)

    def __enter__(self) -> NodeSampler:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def sample_until_stopped(self) -> None:
        failing = False
        while not self.stopped.is_set():
            try:
                self.append_samples()
                failing = False
            except Exception as error:
                # Measuring must never end what is measured; a full disk is met by the stage itself.
                if not failing:
                    logger.warning("no system metrics from %s for now: %s", self.node, error)
                failing = True
            self.stopped.wait(self.interval_s)

    def append_samples(self) -> None:
        """Append a sample now and after every interval, once no other sampler writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8", buffering=1) as file:
            while not locked(file):
                if self.stopped.wait(self.interval_s):
                    return
            step = next_step(self.path)
            while True:
                metrics = {f"system/{self.node}/{name}": value for name, value in self.sample().items()}
                file.write(json.dumps({"step": step, "time": time.time(), "metrics": metrics}) + "\n")
                step += 1
                if self.stopped.wait(self.interval_s):
                    return

    def sample(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self.path.parent))
        network = psutil.net_io_counters()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "process_tree_memory_megabytes": process_tree_bytes() / MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "network_receive_megabytes": (network.bytes_recv - self.network_at_start.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self.network_at_start.bytes_sent) / MEGABYTE,
            **self.gpus.sample(),
        }


class Gpus:
    """The NVIDIA GPUs of this node; none where the driver or the package nvidia-ml-py is missing."""

    def __init__(self) -> None:
        self.nvml: Any = None
        self.handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml = pynvml
            self.handles = [
                pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
            ]
        except Exception as error:  # ImportError, or any of NVML's own on a machine without a driver
            logger.debug("no GPU metrics: %s", error)

    def sample(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for index, handle in enumerate(self.handles):
            memory = self.nvml.nvmlDeviceGetMemoryInfo(handle)
            metrics[f"gpu_{index}_memory_usage_megabytes"] = memory.used / MEGABYTE
            metrics[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            try:
                rates = self.nvml.nvmlDeviceGetUtilizationRates(handle)
                metrics[f"gpu_{index}_utilization_percentage"] = float(rates.gpu)
            except self.nvml.NVMLError_NotSupported:
                continue  # a GPU cut into parts (MIG) has no rate of its own
        return metrics


def process_tree_bytes() -> int:
    """Resident memory of this process and all below it; shared pages count once for each process."""
    total = 0
    driver = psutil.Process()
    for process in [driver, *driver.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # ended meanwhile
    return total


def locked(file: IO[str]) -> bool:
    """Whether this process has the file to itself; the lock goes with the open file, or the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def next_step(path: Path) -> int:
    """The number of the next sample: one more than the last whole line of any attempt of the stage."""
    last = -1
    for earlier in path.parent.parent.glob(f"*/{path.name}"):
        for line in reversed(earlier.read_text(encoding="utf-8").splitlines()):
            try:
                last = max(last, json.loads(line)["step"])
                break
            except (ValueError, KeyError):
                continue  # half a line: the process was killed while it wrote
    return last + 1
