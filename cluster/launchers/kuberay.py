"""Kind `kuberay`: RayJobs of a Kubernetes cluster, through the official `kubernetes` client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import yaml

from cluster.launchers.kuberay_config import JOB_LABEL
from cluster.launchers.kubernetes_api import answer_reason, connected, explained
from cluster.launchers.launcher import Job, JobState, JobStatus
from cluster.launchers.rayjob import config_map, ray_job
from cluster.site import Site
from vico.errors import UserError, one_line

_GROUP, _VERSION, _PLURAL = "ray.io", "v1", "rayjobs"
_TIMEOUT_S = (10, 60)
"""Seconds for a connection and for an answer."""
_GONE_TIMEOUT_S = 120.0
_SUBMITTER = "ray-job-submitter"
_JOB_STATES: dict[str, JobState] = {"SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "cancelled"}
_WITHOUT_CLUSTER = ("", "Initializing", "Suspending", "Suspended", "Retrying", "Waiting")
"""Values of `jobDeploymentStatus` of a job that does not run (yet, or again)."""


class KubeRayJobs:
    """The RayJobs of one namespace; None: the namespace of the context, or of the pod that this runs in."""

    kind: ClassVar[str] = "kuberay"

    def __init__(self, context: str | None, namespace: str | None, site: Site | None = None) -> None:
        self.context, self._namespace, self._site = context, namespace, site
        self._connection: Any = None

    @property
    def site(self) -> Site:
        assert self._site is not None, "a launcher without a site submits nothing"
        return self._site

    def place(self) -> dict[str, Any]:
        """Return what a later command needs to reach the jobs: also the context that is the current one now,
        which may be another one then."""
        return {"namespace": self.namespace, "context": self.context}

    @property
    def namespace(self) -> str:
        self._client()
        assert self._namespace is not None
        return self._namespace

    def check(self) -> None:
        """Raise UserError if the API server does not answer, refuses us, or has no KubeRay."""
        with self._faults("kuberay"):
            self._objects().list_namespaced_custom_object(
                _GROUP, _VERSION, self.namespace, _PLURAL, limit=1, _request_timeout=_TIMEOUT_S
            )

    def render(self, job: Job) -> str:
        package = "# ConfigMap {name}: {content}".format(
            name=job.name, content=", ".join(["package.zip of the sources", *job.files])
        )
        files = [f"# package.zip/{name}\n{text.rstrip()}" for name, text in job.files.items()]
        manifest = yaml.safe_dump(ray_job(job, self.site), sort_keys=False, width=1000)
        return "\n\n".join([manifest.rstrip(), package, *files])

    def submit(self, job: Job) -> str:
        """Create ConfigMap and RayJob. The server first checks the RayJob without creating it."""
        manifest, files = ray_job(job, self.site), config_map(job, self.site)
        try:
            with self._faults(f"RayJob {job.name}"):
                self._create(manifest, dry_run="All")
                self._core().create_namespaced_config_map(self.namespace, files, _request_timeout=_TIMEOUT_S)
                created = self._create(manifest)
                self._own(job.name, created["metadata"]["uid"])
        except BaseException:
            self._delete(job.name)
            raise
        return f"as RayJob {self.namespace}/{job.name}"

    def status(self, name: str) -> JobStatus:
        try:
            with self._faults(f"RayJob {name}"):
                job = self._read(name)
                if job is None:
                    return JobStatus("unknown", f"there is no RayJob {self.namespace}/{name} any more")
                return self._status(job)
        except UserError as error:
            return JobStatus("unknown", str(error))

    def logs(self, name: str) -> str:
        """Return the log of the submitter pod, or of the head pod, after the reason why the job waits."""
        with self._faults(f"RayJob {name}"):
            job = self._read(name)
            if job is None:
                return ""
            status = self._status(job)
            lines = [status.message] if status.message else []
            pods = self._pods(f"job-name={name}") or self._pods(f"{JOB_LABEL}={name},ray.io/node-type=head")
            for pod in pods[-1:]:
                lines.append(self._pod_log(pod))
            return "\n".join(lines)

    def cancel(self, name: str) -> bool:
        """Delete the RayJob with its cluster and wait until its pods are gone."""
        with self._faults(f"RayJob {name}"):
            job = self._read(name)
            ended = job is None or self._status(job).state not in ("pending", "running")
            self._delete(name)
            deadline = time.monotonic() + _GONE_TIMEOUT_S
            while self._read(name) is not None or self._pods(f"{JOB_LABEL}={name}"):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"RayJob {self.namespace}/{name} is deleted, but pods are left after "
                        f"{_GONE_TIMEOUT_S:g} s; see: kubectl get pods -l {JOB_LABEL}={name}"
                    )
                time.sleep(1)
            return not ended

    def _status(self, job: dict[str, Any]) -> JobStatus:
        status, spec = job.get("status") or {}, job["spec"]
        deployment = status.get("jobDeploymentStatus") or ""
        reason = one_line(": ".join(text for text in (status.get("reason"), status.get("message")) if text))
        if deployment == "Complete" or deployment == "Failed":
            state = _JOB_STATES.get(status.get("jobStatus") or "", "failed")
            return JobStatus("failed" if deployment == "Failed" else state, reason)
        if deployment == "ValidationFailed":
            return JobStatus("failed", reason or "KubeRay refuses the manifest")
        if deployment in _WITHOUT_CLUSTER:
            return JobStatus("pending", self._why_pending(job, spec, deployment, reason))
        return JobStatus("running", reason)

    def _why_pending(self, job: dict[str, Any], spec: dict[str, Any], deployment: str, reason: str) -> str:
        parts = [deployment or "KubeRay's operator has not seen it yet"]
        if spec.get("suspend"):
            queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
            parts.append(f"suspended, waits for Kueue's queue {queue}" if queue else "suspended")
        failed = (job.get("status") or {}).get("failed")
        if failed:
            parts.append(f"{failed} of {spec.get('backoffLimit', 0) + 1} attempts failed")
        parts += [reason] if reason else []
        parts += _pod_problems(self._pods(f"{JOB_LABEL}={job['metadata']['name']}"))[:3]
        return "; ".join(parts)

    def _read(self, name: str) -> dict[str, Any] | None:
        from kubernetes.client.exceptions import ApiException

        try:
            return self._objects().get_namespaced_custom_object(
                _GROUP, _VERSION, self.namespace, _PLURAL, name, _request_timeout=_TIMEOUT_S
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def _create(self, manifest: dict[str, Any], **options: str) -> dict[str, Any]:
        return self._objects().create_namespaced_custom_object(
            _GROUP,
            _VERSION,
            self.namespace,
            _PLURAL,
            manifest,
            field_validation="Strict",
            _request_timeout=_TIMEOUT_S,
            **options,
        )

    def _own(self, name: str, uid: str) -> None:
        """Let the RayJob own its ConfigMap, so that Kubernetes deletes both together."""
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": uid}
        patch = {"metadata": {"ownerReferences": [owner]}}
        self._core().patch_namespaced_config_map(name, self.namespace, patch, _request_timeout=_TIMEOUT_S)

    def _delete(self, name: str) -> None:
        """Delete RayJob and ConfigMap, as far as they exist."""
        from kubernetes.client.exceptions import ApiException

        core, objects = self._core(), self._objects()
        calls = (
            lambda: objects.delete_namespaced_custom_object(
                _GROUP, _VERSION, self.namespace, _PLURAL, name, _request_timeout=_TIMEOUT_S
            ),
            lambda: core.delete_namespaced_config_map(name, self.namespace, _request_timeout=_TIMEOUT_S),
        )
        for call in calls:
            try:
                call()
            except ApiException as error:
                if error.status != 404:
                    raise

    def _pods(self, selector: str) -> list[Any]:
        """Return the pods with these labels, oldest first."""
        pods = self._core().list_namespaced_pod(
            self.namespace, label_selector=selector, _request_timeout=_TIMEOUT_S
        )
        return sorted(pods.items, key=lambda pod: str(pod.metadata.creation_timestamp))

    def _pod_log(self, pod: Any) -> str:
        from kubernetes.client.exceptions import ApiException

        try:
            return self._core().read_namespaced_pod_log(
                pod.metadata.name,
                self.namespace,
                container=_logged_container(pod),
                tail_lines=1000,
                _request_timeout=_TIMEOUT_S,
            )
        except ApiException as error:
            return f"pod {pod.metadata.name} has no log: {answer_reason(error)}"

    def _objects(self) -> Any:
        from kubernetes.client import CustomObjectsApi

        return CustomObjectsApi(self._client())

    def _core(self) -> Any:
        from kubernetes.client import CoreV1Api

        return CoreV1Api(self._client())

    def _client(self) -> Any:
        if self._connection is None:
            self._connection, namespace, self.context = connected(self.context)
            self._namespace = self._namespace or namespace
        return self._connection

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Raise what the API server answers, or that it does not, as UserError."""
        self._client()
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise UserError(f"{what}: {explained(error, self.namespace)}") from error
        except HTTPError as error:
            raise UserError(
                f"{what}: the API server {self._connection.configuration.host} does not answer "
                f"({one_line(error)}); check kuberay.context and `kubectl get rayjobs`"
            ) from error


def _logged_container(pod: Any) -> str:
    """Return the container that prints what the driver prints; a mesh or KubeRay may add others."""
    names = [container.name for container in pod.spec.containers]
    return next((name for name in (_SUBMITTER, "ray-head") if name in names), names[0])


def _pod_problems(pods: list[Any]) -> list[str]:
    """Return why pods do not run, each reason once."""
    problems = []
    for pod in (pod for pod in pods if pod.status is not None):
        for condition in pod.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status == "False":
                problems.append(f"{condition.reason}: {condition.message}")
        for container in pod.status.container_statuses or ():
            waiting = container.state.waiting if container.state else None
            if waiting is not None and waiting.reason not in ("ContainerCreating", "PodInitializing"):
                problems.append(f"{waiting.reason}: {waiting.message or container.image}")
    return list(dict.fromkeys(one_line(problem) for problem in problems))
