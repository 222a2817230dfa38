"""Rules about several blocks of a site file: settings that the kind of site ignores, and nodes that do not
fit.

Each raises ValueError with field, value and remedy. Called by `cluster/site.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.settings.blocks import NodeGroup, Resources

if TYPE_CHECKING:
    from cluster.site import Site

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


def refuse_settings_without_effect(site: Site) -> None:
    """Raise ValueError for a setting that is not at its default and that this kind of site never reads."""
    for field, kinds in _KINDS.items():
        value, default = _value(site, field), _value(type(site).model_construct(), field)
        if site.kind in kinds or value == default:
            continue
        shown = "" if hasattr(value, "model_dump") else f"={value}"
        raise ValueError(
            f"{field}{shown} has no effect with kind: {site.kind}; set kind: {kinds[0]}, or leave {field} out"
        )
    for group in site.nodes:
        if site.kind != "kuberay" and (group.selector or group.tolerations):
            raise ValueError(
                f"nodes: selector and tolerations of group {group.name} have no effect with kind: "
                f"{site.kind}; leave them out"
            )


def refuse_unfit_nodes(site: Site) -> None:
    """Raise ValueError if a process cannot run on any of the nodes that the site lists, or all together are
    too few for the ranks of a training."""
    names = [group.name for group in site.nodes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"nodes: two groups are called {name}; give each its own name")
    if site.kind == "slurm" and len(site.nodes) != 1:
        raise ValueError(
            f"nodes has {len(site.nodes)} groups; a Slurm job takes nodes of one size: give one group, and "
            "run stages that need other nodes from a second site with the same storage (--until)"
        )
    if site.kind == "kuberay" and not site.nodes:
        raise ValueError("nodes is empty; list the worker groups of the RayJob")
    for group in site.nodes:
        if site.kind == "kuberay" and group.memory_gib is None:
            raise ValueError(
                f"nodes: group {group.name} has no memory_gib; give the memory of its pods in GiB"
            )
    for prefix, resources in (("", site.resources), *site.stage_resources()):
        if resources.nodes is not None and site.nodes and resources.nodes not in names:
            raise ValueError(
                f"resources.{prefix}nodes={resources.nodes} is not a group in nodes; known: "
                f"{', '.join(names)}"
            )
        if site.nodes:
            _refuse_too_few(prefix, resources, site.nodes)


def _refuse_too_few(prefix: str, resources: Resources, nodes: list[NodeGroup]) -> None:
    groups = [group for group in nodes if resources.nodes in (None, group.name)]
    cpus, gpus = resources.threads_per_worker, resources.gpus_per_worker
    places = 0
    for group in groups:
        by_cpus = group.cpus // cpus
        places += group.count * (min(by_cpus, int(group.gpus / gpus)) if gpus else by_cpus)
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


def _value(site: Site, field: str) -> object:
    value: object = site
    for name in field.split("."):
        value = getattr(value, name)
    return value
