"""The environment variables of a worker process that follow from the resources of its stage."""

from __future__ import annotations

import os

from cluster.settings.blocks import Resources

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(256 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""glibc keeps freed memory up to 1 GiB. By default it returns tensors of some megabytes to the kernel between
layers, and the page faults of taking them again were a fifth of the time of a vision tower without gradients
(12 MB of activations per layer)."""


def session_environment(resources: Resources) -> dict[str, str]:
    """Return the variables for all processes of a session. With GPUs in any stage, only the number of
    threads: stages without GPUs add theirs."""
    environment = process_environment(resources)
    return {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]} if resources.any_gpus else environment


def process_environment(resources: Resources) -> dict[str, str]:
    """Return the variables for a rank, actor or task.

    One with GPUs must not get CUDA_VISIBLE_DEVICES, which Ray sets. One without gets an empty one: torch
    would use GPUs that are not reserved.
    """
    environment = {"OMP_NUM_THREADS": str(resources.threads_per_worker)}
    if resources.gpus_per_worker:
        return environment
    malloc = {name: os.environ.get(name, value) for name, value in _MALLOC.items()}
    return {**environment, **malloc, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
