"""Speed and memory of a step as metrics, and the trace of chosen steps; used by the training loop."""

import logging
import os
import resource
from collections.abc import Mapping
from pathlib import Path

import torch

from vico.model.attention_kernels import kernels_in_words

logger = logging.getLogger(__name__)
_TOKENS, _TILES = ("policy_tokens", "reference_tokens"), ("tiles", "labelled_tiles")


def speed_metrics(
    sums: Mapping[str, float], seconds: float, world_size: int, peak_tflops: float | None
) -> dict[str, float]:
    """Return the speed of a step and the memory of this rank.

    From the sums over all ranks, if they contain them: tokens (of both rows) and tiles per second, and
    TFLOP/s per rank by `vico/objectives/flops.py` with its share of `peak_tflops` (`mfu`). Peak memory is in
    bytes: of the device on CUDA, otherwise of the process, both since its start.
    """
    metrics = {}
    for name, counts in (("tokens_per_second", _TOKENS), ("tiles_per_second", _TILES)):
        if any(count in sums for count in counts):
            metrics[name] = sum(sums.get(count, 0.0) for count in counts) / seconds
    if "flops" in sums:
        metrics["tflops_per_rank"] = sums["flops"] / seconds / world_size / 1e12
        if peak_tflops is not None:
            metrics["mfu"] = metrics["tflops_per_rank"] / peak_tflops
    metrics["peak_memory_bytes"] = float(
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return metrics


def kernels_in_use(*, compiled: bool) -> str:
    """Return in words what computes here: torch, device, attention, threads, and whether layers are
    compiled."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        device += f", {kernels_in_words()}"
    else:
        device = f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {device}" + (", compiled layers" if compiled else "")


class StepTrace:
    """Records the updates FIRST to LAST (counted from 1) of `train.profiling.trace_steps` with torch's
    profiler.

    Rank 0 writes `trace-steps-FIRST-LAST.json.gz` into `folder`, for chrome://tracing or Perfetto.
    """

    def __init__(self, folder: Path, rank: int, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps if rank == 0 else None
        self._profiler: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Start the profiler if update `step`, which begins now, is the first of the range."""
        if self._steps and self._profiler is None and self._steps[0] <= step <= self._steps[1]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    def end(self, step: int) -> None:
        """Write the trace if update `step`, which is done, is the last of the range."""
        if self._steps and step >= self._steps[1]:
            self._write(self._steps[0], step)

    def close(self, step: int) -> None:
        """Write what was recorded of the range when the training ends after `step` updates."""
        if self._steps is None:
            return
        if self._profiler is None and self._steps[0] > step:
            logger.warning(
                "train.profiling.trace_steps=%s: no trace, the training has %d updates",
                list(self._steps),
                step,
            )
        self._write(self._steps[0], step)

    def _write(self, first: int, last: int) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        path = self._folder / f"trace-steps-{first}-{last}.json.gz"
        partial = path.with_name(f"partial-{path.name}")
        self._profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)
        self._profiler, self._steps = None, None
