"""The `kuberay` block of a site file."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.settings.blocks import SiteBlock
from cluster.settings.texts import refuse_kubernetes_name, refuse_labels

JOB_MOUNT = "/mnt/vico-job"
"""Folder of every pod that has the job's package."""
NAME_LABEL, JOB_LABEL, QUEUE_LABEL = "app.kubernetes.io/name", "vico-job", "kueue.x-k8s.io/queue-name"
_OWN_PATHS = ("/", "/dev/shm", JOB_MOUNT)
_INT32 = (1 << 31) - 1
"""The largest number that these fields of Kubernetes hold."""


class Volume(SiteBlock):
    """A persistent volume claim that every pod mounts, such as the one that holds the storage."""

    claim: str
    """Name of the persistent volume claim."""
    path: str
    """Where pods mount it."""
    read_only: bool = False
    """Mount it read-only."""


class Head(SiteBlock):
    """The head pod, which runs Ray's services and the driver. It has no GPUs."""

    cpus: int = Field(4, ge=1)
    """CPUs of the pod. Ray gives none of them to ranks, actors or tasks."""
    memory_gib: float = Field(16, ge=0.5)
    """Memory of the pod in GiB."""
    selector: dict[str, str] = Field({})
    """Labels that its node must have (`nodeSelector`)."""
    tolerations: list[dict[str, Any]] = Field([])
    """Taints that the pod accepts, passed on as they are."""


class KubeRay(SiteBlock):
    """How `vico submit` makes a RayJob (`ray.io/v1`). Its worker groups are those in `nodes`."""

    namespace: str | None = None
    """Namespace of the job; null: the namespace of the kubeconfig's context, or of the pod that submits."""
    context: str | None = None
    """Context of the kubeconfig; null: the current one."""
    image: str | None = None
    """Image of all pods. It has Python, Ray and this project's dependencies; required."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node pulls the image."""
    image_pull_secrets: list[str] = Field([])
    """Names of secrets with which nodes pull the image."""
    ray_version: str | None = None
    """Version of Ray in the image; null: the one installed here."""
    service_account: str | None = None
    """Service account of the pods; null: the namespace's default."""
    head: Head = Head()
    volumes: list[Volume] = Field([])
    """Claims that every pod mounts."""
    work: str | None = None
    """Folder on one of the `volumes` for the working copy of an object store, which all pods must see; needed
    with one. `work` is the folder on the submitting machine."""
    secrets: list[str] = Field([])
    """Names of secrets whose keys become environment variables of every pod, such as AWS_SECRET_ACCESS_KEY.
    Only the names enter the manifest."""
    shared_memory_gib: float = Field(8, ge=0.0625)
    """Size of /dev/shm of every pod in GiB, as a volume in memory. It counts against the pod's memory."""
    submission_mode: Literal["K8sJobMode", "SidecarMode", "HTTPMode"] = "K8sJobMode"
    """How KubeRay starts the driver: from a pod of its own, from a container beside the head, or by HTTP."""
    backoff_limit: int = Field(2, ge=0, le=_INT32)
    """Number of times that KubeRay retries a failed job, each time with a new cluster. The run resumes from
    the storage."""
    submitter_backoff_limit: int = Field(2, ge=0, le=_INT32)
    """Number of retries of the submitter pod in one cluster (K8sJobMode)."""
    active_deadline_s: int | None = Field(None, ge=1, le=_INT32)
    """Seconds after which KubeRay ends the job; null: never."""
    pre_running_deadline_s: int | None = Field(None, ge=1, le=_INT32)
    """Seconds that the job may take until it runs (pods pending, images pulled), after which it fails; null:
    no limit."""
    shutdown_after_finish: bool = True
    """Delete the cluster when the job has ended. Not together with `deletion_rules`."""
    ttl_after_finish_s: int = Field(0, ge=0, le=_INT32)
    """Seconds that the cluster stays after the end."""
    deletion_rules: list[dict[str, Any]] = Field([])
    """`deletionStrategy.deletionRules`, passed on as they are; needs `shutdown_after_finish: false`."""
    queue: str | None = None
    """Local queue of Kueue. The job is created suspended, and Kueue starts it; null: no Kueue."""
    managed_by: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    """Controller of the job; null: the operator."""
    token_authentication: bool = True
    """Let KubeRay make a token without which nobody can submit to the cluster (Ray 2.52 or newer)."""
    labels: dict[str, str] = Field({})
    """More labels of the RayJob and its pods."""
    annotations: dict[str, str] = Field({})
    """Annotations of the RayJob and its pods."""

    @model_validator(mode="after")
    def names_are_kubernetes_names(self) -> KubeRay:
        """Kubernetes checks names in pods only when KubeRay makes them, long after the submission."""
        if self.image is not None and re.search(r"\s", self.image):
            raise ValueError(f"kuberay.image={self.image!r} has a space; write it as REGISTRY/NAME:TAG")
        if self.ray_version is not None and not re.match(r"\d+\.\d+\.\d+", self.ray_version):
            raise ValueError(
                f"kuberay.ray_version={self.ray_version!r} is not a version such as 2.60.0; write the image's"
            )
        if self.namespace is not None:
            refuse_kubernetes_name("kuberay.namespace", self.namespace, max_chars=63)
        names = {"service_account": [self.service_account] if self.service_account is not None else []}
        names |= {"secrets": self.secrets, "image_pull_secrets": self.image_pull_secrets}
        for field, those in names.items():
            for name in those:
                refuse_kubernetes_name(f"kuberay.{field}", name)
        refuse_labels("kuberay.head.selector", self.head.selector)
        refuse_labels("kuberay.labels", self.labels)
        refuse_labels("kuberay.annotations", self.annotations, are_annotations=True)
        if self.queue is not None:
            refuse_labels("kuberay", {"queue": self.queue})
        return self

    @model_validator(mode="after")
    def own_labels_and_folders_stay(self) -> KubeRay:
        remedies = {NAME_LABEL: "leave it out", JOB_LABEL: "leave it out", QUEUE_LABEL: "set kuberay.queue"}
        for label, remedy in remedies.items():
            if label in self.labels:
                raise ValueError(f"kuberay.labels.{label}={self.labels[label]} is set by vico; {remedy}")
        paths = [volume.path.rstrip("/") or "/" for volume in self.volumes]
        for volume, path in zip(self.volumes, paths, strict=True):
            refuse_kubernetes_name("kuberay.volumes.claim", volume.claim)
            if not path.startswith("/") or ":" in path:
                raise ValueError(
                    f"kuberay.volumes.path={volume.path} is not an absolute path without colons; write it "
                    "from / on"
                )
            if path in _OWN_PATHS or paths.count(path) > 1:
                raise ValueError(
                    f"kuberay.volumes.path={volume.path} has another volume already; choose another folder "
                    f"for claim {volume.claim}"
                )
        return self

    @model_validator(mode="after")
    def work_is_on_a_volume(self) -> KubeRay:
        written = [volume.path.rstrip("/") for volume in self.volumes if not volume.read_only]
        if self.work is not None and not any(f"{self.work}/".startswith(f"{path}/") for path in written):
            raise ValueError(
                f"kuberay.work={self.work} is not on a volume that pods may write; list its claim in "
                "kuberay.volumes, or name a folder below a path there"
            )
        return self

    @model_validator(mode="after")
    def settings_go_together(self) -> KubeRay:
        if self.deletion_rules and self.shutdown_after_finish:
            raise ValueError(
                "kuberay.deletion_rules and kuberay.shutdown_after_finish=true exclude each other; set "
                "kuberay.shutdown_after_finish: false"
            )
        if self.deletion_rules and self.ttl_after_finish_s:
            raise ValueError(
                f"kuberay.ttl_after_finish_s={self.ttl_after_finish_s} has no effect with "
                "kuberay.deletion_rules; write it into the rules (condition.ttlSeconds)"
            )
        if self.queue is not None and not self.shutdown_after_finish:
            raise ValueError(
                f"kuberay.queue={self.queue} needs a job that can be suspended, and KubeRay suspends none "
                "with kuberay.shutdown_after_finish=false; set it to true"
            )
        if self.ttl_after_finish_s and not self.shutdown_after_finish:
            raise ValueError(
                f"kuberay.ttl_after_finish_s={self.ttl_after_finish_s} has no effect with "
                "kuberay.shutdown_after_finish=false; leave it out"
            )
        if self.submission_mode != "K8sJobMode" and self.submitter_backoff_limit != 2:
            raise ValueError(
                f"kuberay.submitter_backoff_limit={self.submitter_backoff_limit} has no effect with "
                f"kuberay.submission_mode={self.submission_mode}; leave it out"
            )
        return self
