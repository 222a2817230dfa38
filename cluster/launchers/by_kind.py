"""The launcher of a site or of a submission."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.launchers.kuberay import KubeRayJobs
from cluster.launchers.launcher import Launcher
from cluster.launchers.local import LocalJobs
from cluster.launchers.ray_jobs import RayJobs
from cluster.launchers.slurm import SlurmJobs
from cluster.site import Site
from vico.errors import UserError

KINDS = (RayJobs.kind, KubeRayJobs.kind, SlurmJobs.kind, LocalJobs.kind)
"""The `kind` of every submission that this module can reach."""
RESTARTING_KINDS = (KubeRayJobs.kind, SlurmJobs.kind)
"""Kinds whose scheduler may start a job again after its driver has ended."""


def launcher_of(site: Site) -> Launcher:
    """Return the launcher that submits to a site. Raises UserError if the site names no place to submit
    to."""
    if site.kind == "kuberay":
        return KubeRayJobs(site.kuberay.context, site.kuberay.namespace, site)
    if site.kind == "slurm":
        return SlurmJobs(site.slurm.folder or _shared_folder(site), site)
    if site.kind == "local":
        return LocalJobs(site.storage / "jobs", site)
    if site.jobs.address is None:
        raise UserError(
            f"jobs.address is not set in site {site.name}; give the Ray Jobs server's http://HOST:8265"
        )
    return RayJobs(site.jobs.address, site)


def _shared_folder(site: Site) -> Path:
    if site.remote is not None:
        raise UserError(
            f"slurm.folder is not set in site {site.name}, and storage={site.remote} is not a folder; give a "
            "folder that all nodes see, for scripts, sources and logs of jobs"
        )
    return site.storage / "jobs"


def launcher_of_submission(submission: Mapping[str, Any]) -> Launcher:
    """Return the launcher that reaches a job which was submitted before.

    Raises UserError if the submission, as run.json has it, lacks what leads to the job.
    """
    kind = submission.get("kind")
    places = {KubeRayJobs.kind: (), SlurmJobs.kind: ("folder",), LocalJobs.kind: ("folder",)}
    for name in ("kind", "id", *places.get(str(kind), ("address",))):
        if not isinstance(submission.get(name), str):
            raise UserError(
                f"submission.{name}={submission.get(name)!r} in run.json does not lead to the job; ask its "
                "scheduler, or restore run.json"
            )
    if kind == KubeRayJobs.kind:
        return KubeRayJobs(submission.get("context"), submission.get("namespace"))
    if kind == SlurmJobs.kind:
        return SlurmJobs(submission["folder"])
    if kind == LocalJobs.kind:
        return LocalJobs(submission["folder"])
    return RayJobs(submission["address"])
