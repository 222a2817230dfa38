"""Checks before a run starts anything: a writable storage with free space, free ports, and GPUs."""

import os
import shutil
import socket
from pathlib import Path

from cluster.site import Site
from pipeline.planning.request import OpenPipeline
from pipeline.storage.lookup import storage_of
from vico.errors import UserError

MIB = 1 << 20
_STAGE_BYTES = 64 * MIB
"""Required per stage: its logs, tables and a small model. Stages themselves check the space for shards and
checkpoints."""


def check_storage(storage: Path) -> None:
    """Create the storage folder. Raises UserError if it is not writable."""
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"storage={storage} cannot be created ({error.strerror}); choose another with --storage"
        ) from error
    if not os.access(storage, os.W_OK | os.X_OK):
        raise UserError(
            f"storage={storage} is not writable; fix its permissions or choose another with --storage"
        )
    storage_of(storage).check_writable()


def check_kind(site: Site) -> None:
    """Raise UserError for a site whose nodes exist only inside a job."""
    if site.kind in ("kuberay", "slurm") and "RAY_ADDRESS" not in os.environ:
        raise UserError(
            f"--site {site.name} is of kind {site.kind}, where a run works inside a job; use `vico submit`"
        )


def check_free_space(storage: Path, opened: OpenPipeline) -> None:
    """Raise UserError if the storage has not even enough free space for small stages."""
    needed = _STAGE_BYTES * len(opened.stages_to_run)
    free = shutil.disk_usage(storage).free
    if free < needed:
        raise UserError(
            f"storage={storage} has {free // MIB} MiB free, this run needs at least {needed // MIB} MiB; "
            "free some space or choose another folder with --storage"
        )


def check_ports(site: Site, opened: OpenPipeline) -> None:
    """Raise UserError if the port of the metrics, or of a local Ray's dashboard, is in use. Imports Ray if a
    stage needs it."""
    if site.metrics.port is not None and opened.stages_to_run:
        _refuse_metrics_port_in_use(site.metrics.host, site.metrics.port)
    starts_ray = site.ray.address is None and "RAY_ADDRESS" not in os.environ
    if _needs_ray(opened) and starts_ray and site.ray.dashboard_port is not None:
        from cluster.ray_session import refuse_port_in_use

        refuse_port_in_use("ray.dashboard_port", site.ray.dashboard_port)


def _refuse_metrics_port_in_use(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"metrics.port={port} on metrics.host={host} cannot be used ({error.strerror}); choose "
                "another port, or null for no metrics"
            ) from error


def check_gpus(site: Site, opened: OpenPipeline) -> None:
    """Raise UserError if a local Ray would have fewer GPUs than the stages ask for: it would wait for them.

    The shard stage uses none.
    """
    if site.ray.address is not None or "RAY_ADDRESS" in os.environ:
        return
    here = num_local_gpus()
    for task in opened.pipeline.tasks:
        if task.name not in opened.stages_to_run or not task.spec.needs_ray or task.name == "shard":
            continue
        resources = site.resources.of_stage(task.name)
        count = "workers" if hasattr(task.config, "packs_per_step") else "actors"
        num_processes = getattr(resources, count)
        needed = num_processes * resources.gpus_per_worker
        if here is not None and needed > here:
            gpus_field = site.resources.field_of(task.name, "gpus_per_worker")
            count_field = site.resources.field_of(task.name, count)
            raise UserError(
                f"{gpus_field}={resources.gpus_per_worker:g} with {count_field}={num_processes} takes "
                f"{needed:g} GPUs, and this machine has {here}; set {gpus_field}: 0 to run on CPUs, or give "
                "a site whose machines have them"
            )


def num_local_gpus(devices: Path = Path("/dev")) -> int | None:
    """Return the number of NVIDIA GPUs that a process here may use; None if that cannot be told."""
    num_devices = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    if not num_devices and (devices / "dxg").exists():  # WSL shows GPUs as another device
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_devices
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    # An instance of a split GPU (MIG) is named here, and several of them are one device.
    return len(named) if any(name.startswith("MIG") for name in named) else min(len(named), num_devices)


def _needs_ray(opened: OpenPipeline) -> bool:
    return any(task.spec.needs_ray for task in opened.pipeline.tasks if task.name in opened.stages_to_run)
