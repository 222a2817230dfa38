"""Sample the load of this node while a stage runs: CPU, memory, disk, network and GPUs.

The driver starts a sampler, and so does the first rank on each node of a training. Each sample is a line of
`system-<node>.jsonl` in the attempt's folder.
"""

from __future__ import annotations

import fcntl
import logging
import platform
import re
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from cluster.metric_lines import MetricsWriter, last_metric_line, system_metrics_file

logger = logging.getLogger(__name__)
MEGABYTE = 1e6


class NodeSampler:
    """A thread that samples the node every `interval_s` seconds between `start` and `stop`.

    The steps continue those of the stage's earlier attempts, so that the samples of all attempts are one
    series. The names are those of MLflow's system metrics. A sample that fails is left out; the first failure
    of a series is logged. When a node has several samplers for one attempt, only one of them writes.
    """

    def __init__(self, attempt_folder: Path, *, interval_s: float = 10.0, node: str | None = None) -> None:
        self.node = re.sub(r"[^\w.-]", "_", node or platform.node() or "node")
        self.path = attempt_folder / system_metrics_file(self.node)
        self.interval_s = interval_s
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.sample_until_stopped, name="node-metrics", daemon=True)
        self.gpus = Gpus()
        self.network_at_start = psutil.net_io_counters()

    def start(self) -> None:
        psutil.cpu_percent()  # the first call has nothing to compare with and returns 0
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
                # A measurement must never end the stage; a full disk stops the stage itself.
                if not failing:
                    logger.warning("no system metrics from %s for now: %s", self.node, error)
                failing = True
            self.stopped.wait(self.interval_s)

    def append_samples(self) -> None:
        """Wait until no other sampler writes the file, then append a sample now and after every interval."""
        with MetricsWriter(self.path) as writer:
            while not try_lock(writer):
                if self.stopped.wait(self.interval_s):
                    return
            step = next_step(self.path)
            while True:
                metrics = {f"system/{self.node}/{name}": value for name, value in self.sample().items()}
                writer.append(step, metrics)
                step += 1
                if self.stopped.wait(self.interval_s):
                    return

    def sample(self) -> dict[str, float]:
        """Return what is measured now; network traffic counts from the sampler's construction."""
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
    """The NVIDIA GPUs of this node; none when the driver or the package nvidia-ml-py is missing."""

    def __init__(self) -> None:
        self.nvml: ModuleType | None = None
        self.handles: list[Any] = []  # pointers of the C library
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml = pynvml
            self.handles = [
                pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
            ]
        except Exception as error:  # ImportError, or an NVMLError on a machine without a driver
            logger.debug("no GPU metrics: %s", error)

    def sample(self) -> dict[str, float]:
        """Return memory (megabytes and per cent) and utilization (per cent) of every GPU."""
        metrics: dict[str, float] = {}
        if self.nvml is None:
            return metrics
        for index, handle in enumerate(self.handles):
            memory = self.nvml.nvmlDeviceGetMemoryInfo(handle)
            metrics[f"gpu_{index}_memory_usage_megabytes"] = memory.used / MEGABYTE
            metrics[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            try:
                rates = self.nvml.nvmlDeviceGetUtilizationRates(handle)
                metrics[f"gpu_{index}_utilization_percentage"] = float(rates.gpu)
            except self.nvml.NVMLError_NotSupported:
                continue  # a GPU that is split into instances (MIG) has no utilization of its own
        return metrics


def process_tree_bytes() -> int:
    """Return the resident memory of this process and all its descendants, in bytes.

    A page that several processes share is counted once per process.
    """
    total = 0
    this_process = psutil.Process()
    for process in [this_process, *this_process.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # it has ended meanwhile
    return total


def try_lock(file: MetricsWriter) -> bool:
    """Lock the file unless another sampler holds it; return whether this one has the lock.

    The lock ends when the file is closed or the process ends.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def next_step(path: Path) -> int:
    """Return the step of the next sample: one more than the last step in any attempt of the stage."""
    files_of_attempts = path.parent.parent.glob(f"*/{path.name}")
    last_lines = (last_metric_line(file) for file in files_of_attempts)
    return max((line.step for line in last_lines if line is not None), default=-1) + 1
