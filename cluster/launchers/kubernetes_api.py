"""Connect to a Kubernetes API server, and explain its refusals. Used by `kuberay.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from vico.errors import UserError, missing_package, one_line

_NAMESPACE_OF_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connected(context: str | None) -> tuple[Any, str, str | None]:
    """Return a client, its namespace and its context, from the kubeconfig or, in a pod, from its service
    account, which has no context."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise missing_package("kind: kuberay", "kubernetes") from error
    configuration, file = client.Configuration(), os.environ.get("KUBECONFIG")
    try:
        config.load_kube_config(file, context=context, client_configuration=configuration)
        contexts, active = config.list_kube_config_contexts(file)
        chosen = next((entry for entry in contexts if entry["name"] == context), active)
        namespace, context = chosen["context"].get("namespace", "default"), chosen["name"]
    except config.ConfigException as error:
        try:
            if context is not None:  # the pod's own cluster may be another one
                raise error
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            raise UserError(
                f"kuberay.context={context}: {one_line(error)}; set KUBECONFIG, or name one of `kubectl "
                "config get-contexts`"
            ) from error
        namespace = _NAMESPACE_OF_POD.read_text(encoding="utf-8").strip()
    configuration.retries = 1
    return client.ApiClient(configuration), namespace, context


def explained(error: Any, namespace: str) -> str:
    """Return an answer of the API server as one line with a remedy."""
    reason = answer_reason(error)
    if error.status == 401:
        return f"the API server refuses our credentials ({reason}); log in again, or choose kuberay.context"
    if error.status == 403:
        return (
            f"not allowed in namespace {namespace} ({reason}); ask for a role that may, see docs/clusters.md"
        )
    if error.status == 404:
        return f"the API server knows no RayJobs ({reason}); install KubeRay 1.7, or correct kuberay.context"
    if error.status in (400, 422):
        return f"the API server refuses the manifest ({reason}); correct the kuberay block of the site"
    return f"the API server answers {error.status} ({reason}); try again"


def answer_reason(error: Any) -> str:
    """Return the message of an answer."""
    try:
        return one_line(str(yaml.safe_load(error.body)["message"]))
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        return one_line(str(error.reason))
