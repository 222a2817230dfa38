"""A site: where a pipeline runs. `cluster/site_files.py` reads it from a file.

Nothing here changes a result or enters a fingerprint.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, field_validator, model_validator

from cluster.launchers.kuberay_config import KubeRay
from cluster.launchers.slurm_config import Slurm
from cluster.passwords import is_secret_name, without_passwords
from cluster.settings.blocks import (
    Hook,
    Inference,
    Jobs,
    Kind,
    Metrics,
    NodeGroup,
    RaySettings,
    Resources,
    Retries,
    SiteBlock,
    Tracking,
)
from cluster.settings.rules import (
    num_places,
    refuse_driver_resources,
    refuse_settings_without_effect,
    refuse_small_local_ray,
    refuse_unfit_nodes,
)
from cluster.settings.texts import refuse_unusable_texts, refuse_variables
from cluster.sqlite_uris import sqlite_uri
from cluster.train_settings import TrainSettings


class Site(SiteBlock):
    """All settings of a site file."""

    name: str = "local"
    """Name of the site, recorded with every run on it."""
    kind: Kind = "local"
    """Where runs work: `local`, a Ray of their own on this machine; `ray`, a running Ray cluster;
    `kuberay`, a RayJob on Kubernetes; `slurm`, a batch job. Left out: `ray` with `ray.address` or
    `jobs.address`, else `local`."""
    storage: Path = Path("runs")
    """Folder that every node sees, in which all results are stored; or `s3://bucket/prefix`: results are then
    written to a working copy on this machine and copied there."""
    work: Path | None = None
    """Folder for the working copies of object stores; null: ~/.cache/vico. Only with an `s3://` storage."""
    environment: dict[str, str] = Field({})
    """Environment variables of driver and workers on every node, such as NCCL_SOCKET_IFNAME. No secrets: they
    are part of submitted jobs. A name such as HF_TOKEN or DB_PASSWORD is refused."""
    nodes: list[NodeGroup] = Field([])
    """Groups of nodes that the cluster has, or that KubeRay and Slurm are asked for."""
    ray: RaySettings = RaySettings()
    resources: Resources = Resources()
    train: TrainSettings = TrainSettings()
    inference: Inference = Inference()
    tracking: Tracking = Tracking()
    metrics: Metrics = Metrics()
    jobs: Jobs = Jobs()
    kuberay: KubeRay = KubeRay()
    slurm: Slurm = Slurm()
    retries: Retries = Retries()
    hook: Hook = Hook()

    _remote: str | None = PrivateAttr(None)

    @model_validator(mode="wrap")
    @classmethod
    def storage_may_be_an_address(cls, settings: Any, handler: ModelWrapValidatorHandler[Site]) -> Site:
        address = str(settings.get("storage") or "").rstrip("/") if isinstance(settings, dict) else ""
        if isinstance(settings, dict) and settings.get("storage") == "":
            raise ValueError("storage='' is empty; give a folder, or leave storage out")
        if "://" not in address:
            site = handler(settings)
            if isinstance(settings, dict) and site.work is not None:
                raise ValueError(f"work={site.work} has no effect while storage is a folder; leave it out")
            return site
        if not re.match(r"s3://[^/]+", address):
            raise ValueError(
                f"storage={address} is neither a folder nor s3://bucket/prefix; give one of them"
            )
        given = settings.get("work")
        work = Path(given if isinstance(given, str | Path) and given else "~/.cache/vico")
        working_copy = work / hashlib.sha256(address.encode()).hexdigest()[:16]
        site = handler({**settings, "storage": working_copy})
        if site.tracking.enabled and site.tracking.uri is None:
            raise ValueError(
                f"tracking.uri is not set, and storage={address} cannot hold a database; set "
                "tracking.uri to a server or sqlite:///FILE, or tracking.enabled: false"
            )
        if site.kind == "kuberay" and site.kuberay.work is None:
            raise ValueError(
                f"kuberay.work is not set, and the pods need one folder for the working copy of {address}; "
                "name a folder on a claim in kuberay.volumes"
            )
        site._remote = address
        return site

    @model_validator(mode="before")
    @classmethod
    def kind_by_address(cls, settings: Any) -> Any:
        """Give a file without `kind` the kind `ray` if it has the address of a cluster or a jobs server."""
        if isinstance(settings, dict) and settings.get("kind") is None:
            blocks = (settings.get("ray"), settings.get("jobs"))
            addresses = [block.get("address") for block in blocks if isinstance(block, dict)]
            settings = {**settings, "kind": "ray" if any(addresses) else "local"}
        return settings

    @property
    def remote(self) -> str | None:
        """Return the address of the object store; None if `storage` is a folder."""
        return self._remote

    @property
    def storage_address(self) -> str:
        """Return the storage as a user names it."""
        return self.remote or str(self.storage)

    def as_given(self) -> dict[str, Any]:
        """Return the settings in the form of a site file."""
        content = self.model_dump(mode="json")
        return {**content, "storage": self.remote} if self.remote else content

    @field_validator("environment")
    @classmethod
    def environment_has_no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        secrets = sorted(name for name, value in environment.items() if value and is_secret_name(name))
        if secrets:
            raise ValueError(
                f"{secrets[0]} is a secret by its name, and jobs and Ray keep what is here; take it out, and "
                "set it in the environment of the command and of the nodes (kind kuberay: kuberay.secrets)"
            )
        return environment

    @model_validator(mode="after")
    def settings_fit_the_kind(self) -> Site:
        refuse_unusable_texts(self.kind, self.model_dump())
        refuse_variables(self.kind, self.environment)
        refuse_driver_resources(self.jobs.driver)
        refuse_settings_without_effect(self.kind, self)
        refuse_unfit_nodes(self.kind, self.nodes, self.resources)
        if self.kind == "local":
            self.check_local_ray()
        return self

    def check_local_ray(self) -> None:
        """Raise ValueError if a Ray on this machine has too few CPUs and would wait for them forever."""
        refuse_small_local_ray(self.ray.num_cpus, self.resources)

    def for_stage(self, stage: str) -> Site:
        """Return this site with the resources of one stage."""
        return self.model_copy(update={"resources": self.resources.of_stage(stage)})

    @property
    def most_processes(self) -> int | None:
        """Return how many processes of `resources` run at the same time; None if it is not known."""
        if self.nodes:
            return num_places(self.resources, self.nodes)
        return self.ray.num_cpus // self.resources.threads_per_worker if self.kind == "local" else None

    def in_job(self) -> Site:
        """Return the site as the driver of a submitted job reads it: it joins the cluster that it runs in."""
        if self.kind == "local":
            return self
        ray = self.ray.model_copy(update={"address": "auto"})
        plain = [group.model_copy(update={"selector": {}, "tolerations": []}) for group in self.nodes]
        own: dict[str, Any] = {"nodes": plain, "jobs": Jobs(), "kuberay": KubeRay(), "slurm": Slurm()}
        if self.kind == "kuberay" and self.kuberay.work is not None:
            own["work"] = Path(self.kuberay.work)
        return self.model_copy(update={"kind": "ray", "ray": ray, **own})

    @property
    def tracking_uri(self) -> str:
        """Return the URI of MLflow; by default an sqlite database in the storage folder."""
        return self.tracking.uri or sqlite_uri(self.storage.resolve() / "mlflow.db")

    @property
    def tracking_address(self) -> str:
        """Return the tracking URI without its password, for files and messages."""
        return without_passwords(self.tracking_uri)
