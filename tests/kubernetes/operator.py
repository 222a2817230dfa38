"""What KubeRay's operator does to a RayJob, as far as tests need it; played with the official client."""

from pathlib import Path
from typing import Any

from kubernetes import client, config

from tests.waiting import wait_until

NAMESPACE = "vico"
_RAY_JOBS = ("ray.io", "v1", NAMESPACE, "rayjobs")


class Operator:
    """Acts on the cluster of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        connection = config.new_client_from_config(str(kubeconfig))
        self.objects, self.core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)

    def jobs(self) -> list[dict[str, Any]]:
        return self.objects.list_namespaced_custom_object(*_RAY_JOBS)["items"]

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
    wait_until(operator.jobs)
    return operator.jobs()[0]
