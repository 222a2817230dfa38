"""Whether the nodes of a cluster have room for the replicas, which would otherwise wait for ever."""

import ray

from pipeline.serving.start.settings import ReplicaOptions
from vico.errors import UserError


def refuse_small_cluster(options: ReplicaOptions, device: str) -> None:
    """Raise UserError if the nodes have too little for the replicas, whatever else uses them now."""
    resources = options.site.resources
    if ":" in device:
        raise UserError(f"--device={device}: Ray chooses the GPU of each replica; give --device cuda")
    if device.startswith("cuda") != (resources.gpus_per_worker > 0):
        raise UserError(
            f"--device={device} with resources.gpus_per_worker={resources.gpus_per_worker:g} of site "
            f"{options.site.name}: replicas on GPUs need --device cuda and a share of a GPU each"
        )
    each = resources.per_process
    available = ray.cluster_resources()
    for kind, needed in each.items():
        have = available.get(kind, 0)
        if have < options.number * needed:
            raise UserError(
                f"--replicas={options.number} need {options.number * needed:g} {kind}, Ray has {have:g}; "
                "give fewer replicas, or a site with more (`ray.num_cpus` of a local Ray)"
            )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(kind, 0) / needed + 1e-9 for kind, needed in each.items())) for node in nodes)
    if room < options.number:
        wanted = ", ".join(f"{needed:g} {kind}" for kind, needed in each.items())
        raise UserError(
            f"--replicas={options.number}: a replica takes {wanted}, and Ray's nodes have room for {room}; "
            "give fewer replicas, or less for each (`resources` of the site)"
        )
