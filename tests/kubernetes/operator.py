"""What KubeRay's operator does to a RayJob, as far as tests need it; played with the official client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch

from tests.waiting import PATIENCE_S

NAMESPACE = "vico"
_RAY_JOBS = ("ray.io", "v1", NAMESPACE, "rayjobs")


class Operator:
    """Acts on the cluster of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        connection = config.new_client_from_config(str(kubeconfig))
        self.objects, self.core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)

    def jobs(self, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Yield RayJobs as they are created."""
        events = watch.Watch().stream(
            self.objects.list_namespaced_custom_object, *_RAY_JOBS, timeout_seconds=int(timeout_s)
        )
        for event in events:
            if event["type"] == "ADDED":
                yield event["object"]

    def job(self, name: str) -> dict[str, Any]:
        return self.objects.get_namespaced_custom_object(*_RAY_JOBS, name)

    def set_status(self, name: str, **status: Any) -> None:
        """Write `jobDeploymentStatus`, `jobStatus`, `message` and so on."""
        self.objects.patch_namespaced_custom_object_status(*_RAY_JOBS, name, {"status": status})

    def make_pod(self, job: dict[str, Any], suffix: str, template: dict[str, Any], **labels: str) -> str:
        """Create a pod of a job, owned by it, as KubeRay makes it from a template; return its name."""
        metadata = job["metadata"]
        name = f"{metadata['name']}-{suffix}"
        owner = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "name": metadata["name"],
            "uid": metadata["uid"],
        }
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {**template["metadata"]["labels"], **labels},
                "ownerReferences": [owner],
            },
            "spec": template["spec"],
        }
        self.core.create_namespaced_pod(NAMESPACE, pod)
        return name

    def set_pod_status(self, name: str, **status: Any) -> None:
        self.core.patch_namespaced_pod_status(name, NAMESPACE, {"status": status})


def wait_for_job(operator: Operator) -> dict[str, Any]:
    """Return the first RayJob that is created."""
    for job in operator.jobs(PATIENCE_S):
        return job
    raise AssertionError(f"no RayJob within {PATIENCE_S:.0f} s")
