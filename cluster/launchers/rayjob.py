"""The manifests of a job on KubeRay: a RayJob (`ray.io/v1`), and a ConfigMap with the job's files.

Rules of KubeRay 1.7 that are easy to miss: the name has at most 47 characters; `backoffLimit` makes a whole
new cluster, `submitterConfig.backoffLimit` only a new submitter pod; SidecarMode takes no `submitterConfig`;
only a job with `shutdownAfterJobFinishes` can be suspended; `rayVersion` must be the version of Ray that the
image has.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
from typing import Any

import yaml

from cluster.launchers.archive import write_package_to
from cluster.launchers.kuberay_config import JOB_LABEL, JOB_MOUNT, NAME_LABEL, QUEUE_LABEL
from cluster.launchers.launcher import STOP_WAIT_S, Job
from cluster.settings.blocks import NodeGroup
from cluster.site import Site
from vico.errors import UserError

PACKAGE = "package.zip"
MAX_NAME_CHARS = 47
_CONFIG_MAP_BYTES = 1 << 20
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


def config_map(job: Job, site: Site) -> dict[str, Any]:
    """Return the ConfigMap with the package. Raises UserError if it is larger than Kubernetes takes."""
    package = io.BytesIO()
    write_package_to(package, job.files, with_sources=site.jobs.code == "archive")
    content = package.getvalue()
    if len(content) > _CONFIG_MAP_BYTES:
        raise UserError(
            f"the job's package has {len(content)} bytes, and a ConfigMap at most {_CONFIG_MAP_BYTES}; "
            "install vico in kuberay.image and set jobs.code: installed"
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, site),
        "binaryData": {PACKAGE: base64.b64encode(content).decode("ascii")},
    }


def ray_job(job: Job, site: Site) -> dict[str, Any]:
    """Return the RayJob. Raises UserError for a site without an image, and a name that is too long."""
    kuberay = site.kuberay
    if kuberay.image is None:
        raise UserError(
            f"kuberay.image is not set in site {site.name}; name an image with Python, Ray and the "
            "dependencies of vico (docker/Dockerfile builds one)"
        )
    if len(job.name) > MAX_NAME_CHARS:
        raise ValueError(f"the job's name {job.name} has more than {MAX_NAME_CHARS} characters")
    optional = {
        "activeDeadlineSeconds": kuberay.active_deadline_s,
        "preRunningDeadlineSeconds": kuberay.pre_running_deadline_s,
        "managedBy": kuberay.managed_by,
        "suspend": True if kuberay.queue is not None else None,
        "ttlSecondsAfterFinished": kuberay.ttl_after_finish_s or None,
        "deletionStrategy": {"deletionRules": kuberay.deletion_rules} if kuberay.deletion_rules else None,
        "entrypointNumCpus": site.jobs.driver.cpus or None,
        "entrypointResources": json.dumps(site.jobs.driver.custom) if site.jobs.driver.custom else None,
        "submitterConfig": (
            {"backoffLimit": kuberay.submitter_backoff_limit}
            if kuberay.submission_mode == "K8sJobMode"
            else None
        ),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(job, site),
        "spec": {
            "entrypoint": job.shell_command(site),
            "runtimeEnvYAML": _runtime_env(job, site),
            "submissionMode": kuberay.submission_mode,
            "backoffLimit": kuberay.backoff_limit,
            "shutdownAfterJobFinishes": kuberay.shutdown_after_finish,
            **{name: value for name, value in optional.items() if value is not None},
            "rayClusterSpec": _cluster(job, site),
        },
    }


def _runtime_env(job: Job, site: Site) -> str:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **job.environment()}
    content = {"working_dir": f"file://{JOB_MOUNT}/{PACKAGE}", "env_vars": variables}
    return yaml.safe_dump(content, sort_keys=False, width=1000)


def _cluster(job: Job, site: Site) -> dict[str, Any]:
    kuberay, head = site.kuberay, site.kuberay.head
    cluster: dict[str, Any] = {
        "rayVersion": kuberay.ray_version or importlib.metadata.version("ray"),
        "headGroupSpec": {
            # No work of Ray on the head: a rank that takes all its memory would take the cluster with it.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
            "template": _pod(
                job,
                site,
                _container(
                    site,
                    "ray-head",
                    {"cpu": str(head.cpus), "memory": _gib(head.memory_gib)},
                    ports=[{"containerPort": port, "name": name} for name, port in _PORTS.items()],
                ),
                head.selector,
                head.tolerations,
            ),
        },
        "workerGroupSpecs": [_worker_group(job, site, group) for group in site.nodes],
    }
    if kuberay.token_authentication:
        cluster["authOptions"] = {"mode": "token"}
    return cluster


def _worker_group(job: Job, site: Site, group: NodeGroup) -> dict[str, Any]:
    assert group.memory_gib is not None, "the site file was checked for it"
    limits = {"cpu": str(group.cpus), "memory": _gib(group.memory_gib)}
    if group.gpus:
        limits["nvidia.com/gpu"] = str(group.gpus)
    container = _container(site, "ray-worker", limits)
    return {
        "groupName": group.name,
        "replicas": group.count,
        "minReplicas": group.count,
        "maxReplicas": group.count,
        # KubeRay pastes the value into a shell command, so it brings its quotes.
        "rayStartParams": {"resources": f'"{{\\"{group.resource}\\": 1}}"'},
        "template": _pod(job, site, container, group.selector, group.tolerations),
    }


def _pod(
    job: Job,
    site: Site,
    container: dict[str, Any],
    selector: dict[str, str],
    tolerations: list[dict[str, Any]],
) -> dict[str, Any]:
    kuberay = site.kuberay
    volumes = [
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": _gib(kuberay.shared_memory_gib)},
        },
        {"name": "job", "configMap": {"name": job.name}},
        *(
            {
                "name": f"claim-{number}",
                "persistentVolumeClaim": {"claimName": volume.claim, "readOnly": volume.read_only},
            }
            for number, volume in enumerate(kuberay.volumes)
        ),
    ]
    optional = {
        "nodeSelector": selector,
        "tolerations": tolerations,
        "serviceAccountName": kuberay.service_account,
        "imagePullSecrets": [{"name": name} for name in kuberay.image_pull_secrets],
    }
    metadata = {"labels": _labels(job, site)} | (
        {"annotations": kuberay.annotations} if kuberay.annotations else {}
    )
    spec = {"containers": [container], "volumes": volumes}
    return {"metadata": metadata, "spec": spec | {name: value for name, value in optional.items() if value}}


def _container(
    site: Site, name: str, limits: dict[str, str], ports: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    kuberay = site.kuberay
    mounts: list[dict[str, Any]] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "job", "mountPath": JOB_MOUNT, "readOnly": True},
    ]
    mounts += [
        {"name": f"claim-{number}", "mountPath": volume.path, "readOnly": volume.read_only}
        for number, volume in enumerate(kuberay.volumes)
    ]
    optional = {
        "ports": ports,
        # Kubernetes reads $(NAME) as another variable, and $$ as $.
        "env": [
            {"name": variable, "value": text.replace("$", "$$")}
            for variable, text in site.environment.items()
        ],
        "envFrom": [{"secretRef": {"name": secret}} for secret in kuberay.secrets],
    }
    container = {
        "name": name,
        "image": kuberay.image,
        "imagePullPolicy": kuberay.image_pull_policy,
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "volumeMounts": mounts,
    }
    return container | {field: value for field, value in optional.items() if value}


def _metadata(job: Job, site: Site) -> dict[str, Any]:
    kuberay = site.kuberay
    queue = {QUEUE_LABEL: kuberay.queue} if kuberay.queue is not None else {}
    metadata: dict[str, Any] = {"name": job.name, "labels": {**_labels(job, site), **queue}}
    if kuberay.namespace is not None:
        metadata["namespace"] = kuberay.namespace
    if kuberay.annotations:
        metadata["annotations"] = dict(kuberay.annotations)
    return metadata


def _labels(job: Job, site: Site) -> dict[str, str]:
    return {NAME_LABEL: "vico", JOB_LABEL: job.name, **site.kuberay.labels}


def _gib(gib: float) -> str:
    return f"{gib:g}Gi" if gib == int(gib) else f"{gib * 1024:.0f}Mi"
