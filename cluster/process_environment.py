"""The environment variables of a worker process that follow from the resources of its stage."""

from __future__ import annotations

from cluster.settings.blocks import Resources


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
    return {**environment, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
