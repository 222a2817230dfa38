"""What must hold before a run starts anything: a storage folder with room, and free ports."""

import os
import shutil
from pathlib import Path

from cluster.site import Site
from pipeline.planning.plan import PlannedStage
from pipeline.planning.tasks import Pipeline
from pipeline.storage.lookup import storage_of
from vico.errors import UserError

MIB = 1 << 20
_STAGE_BYTES = 64 * MIB
"""Asked for each stage: its logs, tables and a small model. Shards and checkpoints are checked by their
stages."""


def check_storage(storage: Path) -> None:
    """Make the storage folder; UserError if it cannot be written."""
    try:
        storage.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"storage={storage} cannot be made ({error.strerror}); choose another with --storage"
        ) from error
    if not os.access(storage, os.W_OK | os.X_OK):
        raise UserError(
            f"storage={storage} cannot be written; mend its rights or choose another with --storage"
        )
    storage_of(storage).check_writable()


def check_free_space(storage: Path, planned: list[PlannedStage]) -> None:
    """UserError when so little is free that even small stages would fill the disk."""
    needed = sum(_STAGE_BYTES for one in planned if one.action == "run")
    free = shutil.disk_usage(storage).free
    if free < needed:
        raise UserError(
            f"storage={storage} has {free // MIB} MiB free, this run needs at least {needed // MIB} MiB; "
            "free some space or choose another folder with --storage"
        )


def check_ports(site: Site, pipeline: Pipeline, planned: list[PlannedStage]) -> None:
    """UserError when the port that a local Ray was given is in use. Imports Ray, so only where a stage
    will need it."""
    running = {one.stage for one in planned if one.action == "run"}
    needs_ray = any(task.spec.needs_ray for task in pipeline.tasks if task.name in running)
    starts_ray = site.ray.address is None and "RAY_ADDRESS" not in os.environ
    if needs_ray and starts_ray and site.ray.dashboard_port is not None:
        from cluster.ray_session import refuse_port_in_use

        refuse_port_in_use("ray.dashboard_port", site.ray.dashboard_port)
