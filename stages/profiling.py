"""What a step's metrics say of speed and memory, and the trace of chosen steps; used by the training loop."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path

import torch

from cluster.site import TrainSettings

_TOKENS, _TILES = ("policy_tokens", "reference_tokens"), ("tiles", "labelled_tiles")


def speed_metrics(
    sums: Mapping[str, float], seconds: float, world_size: int, site: TrainSettings
) -> dict[str, float]:
    """Tokens (of both rows) and tiles a second over all ranks, TFLOP/s a rank by `vico/flops.py`, and what
    share of `train.peak_tflops` that is, each where the sums of a step have it; peak memory of this rank in
    bytes (of the device on CUDA, since the start)."""
    found = {}
    for name, counted in (("tokens_per_second", _TOKENS), ("tiles_per_second", _TILES)):
        if any(one in sums for one in counted):
            found[name] = sum(sums.get(one, 0.0) for one in counted) / seconds
    if "flops" in sums:
        found["tflops_per_rank"] = sums["flops"] / seconds / world_size / 1e12
        if site.peak_tflops is not None:
            found["mfu"] = found["tflops_per_rank"] / site.peak_tflops
    on_cuda = torch.cuda.is_available()
    found["peak_memory_bytes"] = float(
        torch.cuda.max_memory_allocated()
        if on_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return found


class StepTrace:
    """Records the updates FIRST to LAST (counted from 1) of `train.trace_steps` with torch's profiler.

    Rank 0 writes `trace-steps-FIRST-LAST.json.gz` into `folder`, for chrome://tracing or Perfetto.
    """

    def __init__(self, folder: Path, rank: int, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps if rank == 0 else None
        self._profiler: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Called before update `step`."""
        if self._steps and self._profiler is None and self._steps[0] <= step <= self._steps[1]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    def end(self, step: int) -> None:
        """Called after update `step`; the last one of the range writes the trace."""
        if self._profiler is None or step < self._steps[1]:
            return
        self._profiler.stop()
        path = self._folder / f"trace-steps-{self._steps[0]}-{self._steps[1]}.json.gz"
        partial = path.with_name(f"partial-{path.name}")
        self._profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)
        self._profiler, self._steps = None, None
