"""What a step's metrics say of speed and memory, and the trace of chosen steps; used by the training loop."""

import logging
import os
import resource
from collections.abc import Mapping
from pathlib import Path

import torch

from cluster.site import TrainSettings
from vico.model.segments import flash_attn_varlen

logger = logging.getLogger(__name__)
_TOKENS, _TILES = ("policy_tokens", "reference_tokens"), ("tiles", "labelled_tiles")


def speed_metrics(
    sums: Mapping[str, float], seconds: float, world_size: int, site: TrainSettings
) -> dict[str, float]:
    """Tokens (of both rows) and tiles a second over all ranks, TFLOP/s a rank by `vico/objectives/flops.py`, and what
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


def kernels_in_use(site: TrainSettings) -> str:
    """What computes here, in words: device, torch, attention, whether layers are compiled, threads."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        device += ", flash-attn" if flash_attn_varlen() else ", torch's varlen attention"
    else:
        device = f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {device}" + (", compiled layers" if site.compile else "")


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
        if self._profiler is not None and step >= self._steps[1]:
            self._write(step)

    def close(self, step: int) -> None:
        """Called when the training is at its end, `step` updates; writes what there is of the range."""
        if self._profiler is not None:
            self._write(step)
        elif self._steps and self._steps[0] > step:
            logger.warning(
                "train.trace_steps=%s: no trace, the training has %d updates", list(self._steps), step
            )

    def _write(self, last: int) -> None:
        self._profiler.stop()
        path = self._folder / f"trace-steps-{self._steps[0]}-{last}.json.gz"
        partial = path.with_name(f"partial-{path.name}")
        self._profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)
        self._profiler, self._steps = None, None
