"""The `kuberay` block of a site file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.settings.blocks import SiteBlock


class Volume(SiteBlock):
    """A persistent volume claim that every pod mounts, such as the one that holds the storage."""

    claim: str
    """Name of the persistent volume claim."""
    path: str = Field(pattern="^/")
    """Where pods mount it."""
    read_only: bool = False
    """Mount it read-only."""


class Head(SiteBlock):
    """The head pod, which runs Ray's services and the driver. It has no GPUs."""

    cpus: int = Field(4, ge=1)
    """CPUs of the pod. Ray gives none of them to ranks, actors or tasks."""
    memory_gib: float = Field(16, gt=0)
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
    secrets: list[str] = Field([])
    """Names of secrets whose keys become environment variables of every pod, such as AWS_SECRET_ACCESS_KEY.
    Only the names enter the manifest."""
    shared_memory_gib: float = Field(8, gt=0)
    """Size of /dev/shm of every pod in GiB, as a volume in memory. It counts against the pod's memory."""
    submission_mode: Literal["K8sJobMode", "SidecarMode", "HTTPMode"] = "K8sJobMode"
    """How KubeRay starts the driver: from a pod of its own, from a container beside the head, or by HTTP."""
    backoff_limit: int = Field(2, ge=0)
    """Number of times that KubeRay retries a failed job, each time with a new cluster. The run resumes from
    the storage."""
    submitter_backoff_limit: int = Field(2, ge=0)
    """Number of retries of the submitter pod in one cluster (K8sJobMode)."""
    active_deadline_s: int | None = Field(None, ge=1)
    """Seconds after which KubeRay ends the job; null: never."""
    pre_running_deadline_s: int | None = Field(None, ge=1)
    """Seconds that the job may take until it runs (pods pending, images pulled), after which it fails; null:
    no limit."""
    shutdown_after_finish: bool = True
    """Delete the cluster when the job has ended. Not together with `deletion_rules`."""
    ttl_after_finish_s: int = Field(0, ge=0)
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
