"""A Kubernetes API over HTTP with as much as RayJobs need: RayJobs, config maps, pods and their logs.

RayJobs are checked against KubeRay's schema (rayjob_schema.json), unknown fields included when the client
asks for a strict check, as the real API server does. Objects are deleted with their owner. No operator runs
here: tests play it with the official client.
"""

import json
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("rayjob_schema.json").read_text())
_PATH = re.compile(
    r"/(?:api/v1|apis/ray\.io/v1)/namespaces/(?P<namespace>[^/]+)/(?P<plural>rayjobs|configmaps|pods)"
    r"(?:/(?P<name>[^/]+)(?:/(?P<part>status|log))?)?"
)
_KINDS = {"rayjobs": ("ray.io/v1", "RayJob"), "configmaps": ("v1", "ConfigMap"), "pods": ("v1", "Pod")}
FORBIDDEN = "forbidden"
"""A namespace in which nothing is allowed."""


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, code: int, reason: str, message: str):
        super().__init__(message)
        self.code, self.reason = code, reason


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of fields that the schema does not have."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource"):
        return
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown_fields(item, schema.get("items", {}), f"{path}[{number}]")
    if not isinstance(value, dict):
        return
    inner = schema.get("additionalProperties")
    for name, field in value.items():
        where = f"{path}.{name}" if path else name
        if name in schema.get("properties", {}):
            if where != "metadata":
                yield from unknown_fields(field, schema["properties"][name], where)
        elif isinstance(inner, dict):
            yield from unknown_fields(field, inner, where)
        elif "properties" in schema:
            yield where


def check_ray_job(manifest: dict[str, Any], *, strict: bool) -> None:
    """Raise Refused for a RayJob that KubeRay's schema does not allow."""
    if strict:
        unknown = [f'unknown field "{name}"' for name in unknown_fields(manifest, SCHEMA)]
        if unknown:
            raise Refused(400, "BadRequest", f"strict decoding error: {', '.join(unknown)}")
    errors = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in jsonschema.Draft4Validator(SCHEMA).iter_errors(manifest)
    ]
    errors += _broken_rules(manifest["spec"])
    if errors:
        name = manifest["metadata"].get("name", "")
        raise Refused(422, "Invalid", f'RayJob.ray.io "{name}" is invalid: {"; ".join(errors)}')


def _broken_rules(spec: dict[str, Any]) -> Iterator[str]:
    """Yield the messages of the rules in the schema (x-kubernetes-validations) that a spec breaks."""
    deletion = spec.get("deletionStrategy")
    if deletion is not None:
        legacy, rules = {"onSuccess", "onFailure"} & set(deletion), "deletionRules" in deletion
        if legacy and rules:
            yield "legacy policies (onSuccess/onFailure) and deletionRules cannot be used together"
        if not rules and len(legacy) < 2:
            yield "deletionStrategy requires either BOTH onSuccess and onFailure, OR the deletionRules field"
    if spec.get("managedBy") not in (None, "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"):
        yield "the managedBy field value must be 'ray.io/kuberay-operator' or 'kueue.x-k8s.io/multikueue'"


class Cluster:
    """The objects of the API, by (namespace, plural, name)."""

    def __init__(self, token: str) -> None:
        self.token, self.logs = token, dict[str, str]()
        self.num_changes = 0
        self._changing = threading.Lock()
        self._objects: dict[tuple[str, str, str], dict[str, Any]] = {}

    def create(self, namespace: str, plural: str, manifest: dict[str, Any], dry_run: bool) -> dict[str, Any]:
        version, kind = _KINDS[plural]
        if (manifest.get("apiVersion"), manifest.get("kind")) != (version, kind):
            raise Refused(
                400, "BadRequest", f"{manifest.get('kind')} in version {manifest.get('apiVersion')}"
            )
        name = manifest["metadata"]["name"]
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name):
            raise Refused(422, "Invalid", f'{kind} "{name}" is invalid: metadata.name')
        if plural == "configmaps" and len(json.dumps(manifest)) > 3 << 19:
            raise Refused(413, "RequestEntityTooLarge", "etcdserver: request is too large")
        if (namespace, plural, name) in self._objects:
            raise Refused(409, "AlreadyExists", f'{plural} "{name}" already exists')
        created = {
            **manifest,
            "metadata": {
                **manifest["metadata"],
                "namespace": namespace,
                "uid": secrets.token_hex(8),
                "creationTimestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            },
        }
        return created if dry_run else self._save((namespace, plural, name), created)

    def read(self, namespace: str, plural: str, name: str) -> dict[str, Any]:
        try:
            return self._objects[namespace, plural, name]
        except KeyError:
            raise Refused(404, "NotFound", f'{plural} "{name}" not found') from None

    def list(self, namespace: str, plural: str, selector: str = "") -> list[dict[str, Any]]:
        wanted = dict(part.split("=") for part in selector.split(",") if part)
        found = [item for key, item in self._objects.items() if key[:2] == (namespace, plural)]
        return [item for item in found if wanted.items() <= item["metadata"].get("labels", {}).items()]

    def patch(self, namespace: str, plural: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        merged = _merged(self.read(namespace, plural, name), patch)
        return self._save((namespace, plural, name), merged)

    def delete(self, namespace: str, plural: str, name: str) -> dict[str, Any]:
        gone = self.read(namespace, plural, name)
        with self._changing:
            del self._objects[namespace, plural, name]
            self.num_changes += 1
        for key, item in list(self._objects.items()):
            owners = item["metadata"].get("ownerReferences", ())
            if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.delete(*key)
        return gone

    def _save(self, key: tuple[str, str, str], item: dict[str, Any]) -> dict[str, Any]:
        with self._changing:
            self.num_changes += 1
            item["metadata"]["resourceVersion"] = str(self.num_changes)
            self._objects[key] = item
        return item


def _merged(value: Any, patch: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(patch, dict):
        return patch
    merged = {**value, **{name: _merged(value.get(name), part) for name, part in patch.items()}}
    return {name: part for name, part in merged.items() if part is not None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self._answer(json.loads(body) if body else {})
        except Refused as error:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": error.code}
            self._send(error.code, {**status, "reason": error.reason, "message": str(error)})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _answer(self, body: dict[str, Any]) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if self.headers.get("Authorization") != f"Bearer {self.cluster.token}":
            raise Refused(401, "Unauthorized", "Unauthorized")
        match = _PATH.fullmatch(url.path)
        if match is None:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        namespace, plural, name, part = match.group("namespace", "plural", "name", "part")
        if namespace == FORBIDDEN:
            message = f'{plural}.ray.io is forbidden: User "test" cannot {self.command.lower()} resource'
            raise Refused(403, "Forbidden", message)
        if self.command == "POST":
            if plural == "rayjobs":
                check_ray_job(body, strict=query.get("fieldValidation") == "Strict")
            self._send(201, self.cluster.create(namespace, plural, body, query.get("dryRun") == "All"))
        elif self.command in ("PATCH", "PUT"):
            changes = {"status": body["status"]} if part == "status" else body
            self._send(200, self.cluster.patch(namespace, plural, name, changes))
        elif self.command == "DELETE":
            self.cluster.delete(namespace, plural, name)
            self._send(200, {"kind": "Status", "status": "Success"})
        elif part == "log":
            self._check_container(self.cluster.read(namespace, plural, name), query.get("container"))
            self._send_text(self.cluster.logs.get(name, ""))
        elif name:
            self._send(200, self.cluster.read(namespace, plural, name))
        else:
            items = self.cluster.list(namespace, plural, query.get("labelSelector", ""))
            metadata = {"resourceVersion": str(self.cluster.num_changes)}
            self._send(200, {"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})

    def _check_container(self, pod: dict[str, Any], container: str | None) -> None:
        """Refuse the log of a pod with several containers unless one of them is named, as Kubernetes does."""
        names = [entry["name"] for entry in pod["spec"]["containers"]]
        if container is None and len(names) > 1:
            raise Refused(400, "BadRequest", f"a container name must be specified, choose one of: {names}")
        if container is not None and container not in names:
            raise Refused(400, "BadRequest", f"container {container} is not valid for the pod")

    def _send(self, code: int, content: dict[str, Any]) -> None:
        self._send_bytes(code, "application/json", json.dumps(content).encode())

    def _send_text(self, text: str) -> None:
        self._send_bytes(200, "text/plain", text.encode())

    def _send_bytes(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def kubernetes_cluster(folder: Path) -> Iterator[Cluster]:
    """Yield a cluster whose kubeconfig is `folder/kubeconfig`, with the namespace `vico`."""
    cluster = Cluster(secrets.token_hex(16))
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [
            {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "vico"}},
            {"name": "stranger", "context": {"cluster": "test", "user": "stranger", "namespace": "vico"}},
            {"name": "gone", "context": {"cluster": "gone", "user": "test", "namespace": "vico"}},
        ],
        "clusters": [
            {"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}},
            {"name": "gone", "cluster": {"server": "http://127.0.0.1:9"}},
        ],
        "users": [
            {"name": "test", "user": {"token": cluster.token}},
            {"name": "stranger", "user": {"token": "wrong"}},
        ],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
