"""Write rayjob_schema.json: what KubeRay's CRD says about the fields of our RayJobs.

    python -m tests.kubernetes.make_schema CRD.yaml

CRD.yaml is `ray.io_rayjobs.yaml` of a KubeRay release (tested: 1.7). It has 25,000 lines, nearly all of them
about pods. Kept are all fields of a RayJob and of a RayCluster, and of a pod those in POD.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMA = Path(__file__).with_name("rayjob_schema.json")
_CONTAINER = (
    "name image imagePullPolicy command args env.name env.value envFrom.secretRef ports.containerPort "
    "ports.name ports.protocol resources.limits resources.requests volumeMounts.name "
    "volumeMounts.mountPath volumeMounts.readOnly"
)
_POD = (
    "nodeSelector tolerations serviceAccountName imagePullSecrets restartPolicy volumes.name "
    "volumes.emptyDir volumes.configMap.name volumes.persistentVolumeClaim"
)
POD = [*(f"containers.{path}" for path in _CONTAINER.split(" ")), *_POD.split(" ")]
UNUSED = (
    "autoscalerOptions",
    "gcsFaultToleranceOptions",
    "headService",
    "historyServerOptions",
    "networkPolicy",
    "rayClusterStatus",
    "submitterPodTemplate",
    "upgradeStrategy",
)


def pruned(schema: dict[str, Any], paths: list[list[str]]) -> dict[str, Any]:
    """Return the schema with only the properties on the paths; a path that ends keeps all below it."""
    if any(not path for path in paths):
        return schema
    if "items" in schema:
        return {**schema, "items": pruned(schema["items"], paths)}
    names = {path[0] for path in paths}
    kept = {
        name: pruned(schema["properties"][name], [path[1:] for path in paths if path[0] == name])
        for name in sorted(names)
    }
    required = [name for name in schema.get("required", ()) if name in kept]
    return {**schema, "properties": kept, **({"required": required} if required else {})}


def without_pods(schema: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Return the schema with every pod template cut to POD, and without descriptions."""
    if name == "template":
        paths = [["metadata"], *(["spec", *path.split(".")] for path in POD)]
        schema = pruned(schema, paths)
    if name in UNUSED:
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    shorter = {key: value for key, value in schema.items() if key != "description"}
    if "properties" in schema:
        shorter["properties"] = {
            field: without_pods(inner, field) for field, inner in schema["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            shorter[key] = without_pods(schema[key])
    return shorter


def main(crd: Path) -> None:
    versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
    (version,) = (entry for entry in versions if entry["name"] == "v1")
    schema = without_pods(version["schema"]["openAPIV3Schema"])
    SCHEMA.write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
