"""Rules about several blocks of a site file: settings that the kind of site ignores, and nodes that do not
fit.

Each raises ValueError with field, value and remedy. Called by `cluster/site.py`.
"""

from __future__ import annotations

from pydantic import BaseModel

from cluster.settings.blocks import NodeGroup, Resources

_KINDS = {
    "jobs.address": ("ray",),
    "jobs.python": ("ray", "kuberay", "slurm"),
    "ray.address": ("ray",),
    "kuberay": ("kuberay",),
    "slurm": ("slurm",),
    "jobs.driver": ("ray", "kuberay"),
    "jobs.driver.memory_gib": ("ray",),
}
"""Field -> the kinds of site that read it."""


def refuse_settings_without_effect(kind: str, site: BaseModel) -> None:
    """Raise ValueError for a setting that is not at its default and that a site of this kind never reads."""
    for field, kinds in _KINDS.items():
        value, default = _value(site, field), _value(type(site).model_construct(), field)
        if kind in kinds or value == default:
            continue
        shown = "" if isinstance(value, BaseModel) else f"={value}"
        raise ValueError(
            f"{field}{shown} has no effect with kind: {kind}; set kind: {kinds[0]}, or leave {field} out"
        )


def refuse_unfit_nodes(kind: str, nodes: list[NodeGroup], resources: Resources) -> None:
    """Raise ValueError if the groups of nodes are not what this kind of site needs, if a process fits on none
    of them, or if all together are too few for the ranks of a training."""
    names = [group.name for group in nodes]
    for group in nodes:
        if names.count(group.name) > 1:
            raise ValueError(f"nodes: two groups are called {group.name}; give each its own name")
        if kind == "kuberay" and group.memory_gib is None:
            raise ValueError(
                f"nodes: group {group.name} has no memory_gib; give the memory of its pods in GiB"
            )
        if kind != "kuberay" and (group.selector or group.tolerations):
            raise ValueError(
                f"nodes: selector and tolerations of group {group.name} have no effect with kind: {kind}; "
                "leave them out"
            )
    if kind == "slurm" and len(nodes) != 1:
        raise ValueError(
            f"nodes has {len(nodes)} groups; a Slurm job takes nodes of one size: give one group, and "
            "run stages that need other nodes from a second site with the same storage (--until)"
        )
    if kind == "kuberay" and not nodes:
        raise ValueError("nodes is empty; list the worker groups of the RayJob")
    for prefix, own in (("", resources), *own_resources(resources)):
        if own.nodes is not None and nodes and own.nodes not in names:
            raise ValueError(
                f"resources.{prefix}nodes={own.nodes} is not a group in nodes; known: {', '.join(names)}"
            )
        if nodes:
            _refuse_too_few(prefix, own, nodes)


def refuse_small_local_ray(num_cpus: int, resources: Resources) -> None:
    """Raise ValueError if a Ray on this machine has too few CPUs and would wait for them forever."""
    for prefix, own in (("", resources), *own_resources(resources)):
        for name in ("workers", "actors", "tasks"):
            count, threads = getattr(own, name), own.threads_per_worker
            if count * threads > num_cpus:
                raise ValueError(
                    f"resources.{prefix}{name}={count} with resources.threads_per_worker={threads} needs "
                    f"{count * threads} CPUs, more than ray.num_cpus={num_cpus}; "
                    f"lower resources.{prefix}{name} or raise ray.num_cpus"
                )


def own_resources(resources: Resources) -> list[tuple[str, Resources]]:
    """Return the resources of each stage that has its own, after the beginning of their field names."""
    return [(f"stages.{stage}.", resources.of_stage(stage)) for stage in resources.stages]


def num_places(resources: Resources, nodes: list[NodeGroup]) -> int:
    """Return how many processes with these resources the nodes take at the same time."""
    cpus, gpus = resources.threads_per_worker, resources.gpus_per_worker
    places = 0
    for group in _groups(resources, nodes):
        by_cpus = group.cpus // cpus
        places += group.count * (min(by_cpus, int(group.gpus / gpus)) if gpus else by_cpus)
    return places


def _groups(resources: Resources, nodes: list[NodeGroup]) -> list[NodeGroup]:
    return [group for group in nodes if resources.nodes in (None, group.name)]


def _refuse_too_few(prefix: str, resources: Resources, nodes: list[NodeGroup]) -> None:
    groups, places = _groups(resources, nodes), num_places(resources, nodes)
    cpus, gpus = resources.threads_per_worker, resources.gpus_per_worker
    needs = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    if not places:
        raise ValueError(
            f"resources.{prefix}threads_per_worker={cpus} and gpus_per_worker={gpus:g}: a process needs "
            f"{needs}, more than any node has ({_shown(groups)}); lower them, or list larger nodes"
        )
    if resources.workers > places:
        raise ValueError(
            f"resources.{prefix}workers={resources.workers} of {needs} each do not fit on the nodes "
            f"({_shown(groups)}), which take {places}; lower it, or raise the count of a group in nodes"
        )


def _shown(groups: list[NodeGroup]) -> str:
    return ", ".join(f"{g.name}: {g.count} x {g.cpus} CPUs, {g.gpus} GPUs" for g in groups)


def _value(site: BaseModel, field: str) -> object:
    value: object = site
    for name in field.split("."):
        value = getattr(value, name)
    return value
