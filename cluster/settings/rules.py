"""Rules about several blocks of a site file: settings that the kind of site ignores, and nodes that do not
fit.

Each raises ValueError with field, value and remedy. Called by `cluster/site.py`.
"""

from __future__ import annotations

from pydantic import BaseModel

from cluster.settings.blocks import DriverResources, NodeGroup, Resources
from cluster.settings.texts import refuse_labels

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
_OWN_FIELDS = {
    "CPU": "set jobs.driver.cpus",
    "GPU": "the driver uses no GPU",
    "memory": "set jobs.driver.memory_gib",
    "object_store_memory": "leave it out",
}
"""Ray's own resources -> what to do instead of listing them among the others."""
_LEAST_QUANTITY = 0.0001


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
    for group in nodes:
        refuse_labels(f"nodes: selector of group {group.name}", group.selector)
    for stage, prefix, own in own_resources(resources):
        _refuse_quantity(f"resources.{prefix}gpus_per_worker", own.gpus_per_worker)
        if own.nodes is not None and nodes and own.nodes not in names:
            raise ValueError(
                f"resources.{prefix}nodes={own.nodes} is not a group in nodes; known: {', '.join(names)}"
            )
        if nodes:
            _refuse_too_few(prefix, own, nodes, has_ranks=stage is None or resources.has_ranks(stage))


def refuse_small_local_ray(num_cpus: int, resources: Resources) -> None:
    """Raise ValueError if a Ray on this machine has too few CPUs and would wait for them forever."""
    for stage, prefix, own in own_resources(resources):
        has_ranks = stage is None or resources.has_ranks(stage)
        for name in ("workers", "actors", "tasks") if has_ranks else ("actors", "tasks"):
            count, threads = getattr(own, name), own.threads_per_worker
            if count * threads > num_cpus:
                raise ValueError(
                    f"resources.{prefix}{name}={count} with resources.threads_per_worker={threads} needs "
                    f"{count * threads} CPUs, more than ray.num_cpus={num_cpus}; "
                    f"lower resources.{prefix}{name} or raise ray.num_cpus"
                )


def refuse_driver_resources(driver: DriverResources) -> None:
    """Raise ValueError for resources of the driver that Ray refuses when the job is submitted."""
    _refuse_quantity("jobs.driver.cpus", driver.cpus)
    for name, quantity in driver.custom.items():
        if name in _OWN_FIELDS:
            raise ValueError(
                f"jobs.driver.custom.{name}={quantity:g} is one of Ray's own resources; {_OWN_FIELDS[name]}"
            )
        if quantity <= 0:
            raise ValueError(
                f"jobs.driver.custom.{name}={quantity:g} is not above 0; correct it, or leave it out"
            )
        _refuse_quantity(f"jobs.driver.custom.{name}", quantity)


def _refuse_quantity(field: str, quantity: float) -> None:
    """Raise ValueError for what Ray does not reserve: 1.5 of something, or less than a 10,000th."""
    if (quantity > 1 and quantity != int(quantity)) or 0 < quantity < _LEAST_QUANTITY:
        raise ValueError(
            f"{field}={quantity:g} cannot be reserved in Ray; give a whole number, or a share between "
            f"{_LEAST_QUANTITY} and 1"
        )


def own_resources(resources: Resources) -> list[tuple[str | None, str, Resources]]:
    """Return (None, "", resources), and (stage, beginning of its fields' names, resources) of each stage that
    has its own."""
    own = [(stage, f"stages.{stage}.", resources.of_stage(stage)) for stage in resources.stages]
    return [(None, "", resources), *own]


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


def _refuse_too_few(prefix: str, resources: Resources, nodes: list[NodeGroup], *, has_ranks: bool) -> None:
    groups, places = _groups(resources, nodes), num_places(resources, nodes)
    cpus, gpus = resources.threads_per_worker, resources.gpus_per_worker
    needs = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    if not places:
        raise ValueError(
            f"resources.{prefix}threads_per_worker={cpus} and gpus_per_worker={gpus:g}: a process needs "
            f"{needs}, more than any node has ({_shown(groups)}); lower them, or list larger nodes"
        )
    if has_ranks and resources.workers > places:
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
