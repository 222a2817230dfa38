"""Checks of every node: versions, code, GPUs, storage, clock and free disk. Inside a joined cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.site import Site
from cluster.site_checks import in_node
from cluster.site_checks.report import CheckResult, failed, passed
from cluster.sources import in_worker
from cluster.sources.driver import driver_code
from vico.errors import one_line

cloudpickle.register_pickle_by_value(in_node)
cloudpickle.register_pickle_by_value(in_worker)
_COMPARED = ("ray", "python", "torch")
_ANSWER_TIMEOUT_S = 120.0
_MIN_FREE = 1 << 30
_MAX_CLOCK_OFFSET_S = 1.0
_GIB = 1 << 30
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Node:
    """A node of the cluster, and what Ray says it has."""

    id: str
    address: str
    resources: dict[str, float]

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the function returns on this node. Raises RayError."""
        strategy = NodeAffinitySchedulingStrategy(self.id, soft=False)
        task = ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
        return ray.get(task.remote(*arguments), timeout=_ANSWER_TIMEOUT_S)


def nodes_of_cluster() -> list[Node]:
    """Return the living nodes that take work, in a stable order."""
    nodes = [
        Node(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def num_fitting(nodes: list[Node], needs: Mapping[str, float]) -> int:
    """Return how many processes with these needs fit on the nodes when nothing else runs there."""

    def times(have: float, name: str, need: float) -> int:
        if name == "GPU" and need < 1:  # a share is one of a single GPU
            return int(have) * int(1 / need + _ROUNDING)
        return int(have / need + _ROUNDING)

    return sum(
        min(times(node.resources.get(name, 0), name, need) for name, need in needs.items() if need)
        for node in nodes
    )


def check_nodes(site: Site, submitter: Mapping[str, str] | None = None) -> list[CheckResult]:
    """Return the results of all checks that ask each node; `submitter`: see `check_site`."""
    nodes = nodes_of_cluster()
    facts: dict[str, dict[str, Any]] = {}
    silent = []
    for node in nodes:
        try:
            facts[node.id] = node.call(in_node.facts, str(site.storage))
        except RayError as error:
            silent.append(f"{node.address}: {one_line(error)}")
    if silent:
        remedy = "look at Ray's logs on that node, or take it out of the cluster"
        results = [failed("nodes", f"{silent[0]} ({len(silent)} of {len(nodes)} nodes)", remedy)]
    else:
        results = [passed("nodes", f"{len(nodes)} nodes answer: {', '.join(n.address for n in nodes)}")]
    answering = [node for node in nodes if node.id in facts]
    return [
        *results,
        _versions(answering, facts, submitter or {}),
        _code(answering, submitter or {}),
        _promised(site, answering, facts),
        _storage(site, answering),
        _clocks(answering),
        _free_disk(answering, facts),
    ]


def versions_here() -> dict[str, str]:
    """Return what the submitting machine has, for `check_site` in a job."""
    here = in_node.facts("/")
    return {**{name: here[name] for name in _COMPARED}, "vico": driver_code()["digest"]}


def _versions(
    nodes: list[Node], facts: dict[str, dict[str, Any]], submitter: Mapping[str, str]
) -> CheckResult:
    here = in_node.facts("/")
    names = _COMPARED
    differing = [
        f"{node.address} has {name} {facts[node.id][name]}, here it is {here[name]}"
        for node in nodes
        for name in names
        if facts[node.id][name] != here[name]
    ]
    if differing:
        return failed("versions", _listed(differing), "install the same versions on all nodes and here")
    others = [
        f"the submitting machine has {name} {submitter[name]}, the nodes have {here[name]}"
        for name in names
        if name in submitter and _compared(name, submitter[name]) != _compared(name, here[name])
    ]
    if others:
        remedy = "install the nodes' versions on the submitting machine, or ours in jobs.python's environment"
        return failed("versions", _listed(others), remedy)
    return passed("versions", ", ".join(f"{name} {here[name]}" for name in names))


def _compared(name: str, version: str) -> str:
    """Return the part of a version that submitting machine and nodes must share: builds of torch for CPUs and
    for CUDA work together, and so do releases of one Python."""
    if name == "python":
        return version.rpartition(".")[0]
    return version.partition("+")[0]


def _code(nodes: list[Node], submitter: Mapping[str, str]) -> CheckResult:
    """Compare the digest of vico's sources, and say where nodes import them from."""
    ours, differing, places = driver_code(), list[str](), set[str]()
    for node in nodes:
        try:
            code = node.call(in_worker.code_here)
        except RayError as error:
            return failed("code", f"{node.address}: {one_line(error)}", "look at Ray's logs on that node")
        folder = code["packages"]["vico"]["folder"]
        places.add(str(folder))
        if code["digest"] != ours["digest"]:
            differing.append(f"{node.address} imports vico from {folder or 'nowhere'}")
    if differing:
        remedy = "install the same version there, or use a folder that all nodes see (jobs.code: archive)"
        return failed("code", f"other code than here: {_listed(differing)}", remedy)
    if submitter.get("vico", ours["digest"]) != ours["digest"]:
        detail = f"the submitting machine has vico {submitter['vico'][:12]}, the nodes {ours['digest'][:12]}"
        remedy = "install the same version there, or send the sources of this machine (jobs.code: archive)"
        return failed("code", f"{detail} from {', '.join(sorted(places))}", remedy)
    return passed("code", f"vico {ours['digest'][:12]} from {', '.join(sorted(places))}")


def _promised(site: Site, nodes: list[Node], facts: dict[str, dict[str, Any]]) -> CheckResult:
    """Compare nodes and GPUs with those that the site lists, and the resources of stages with the nodes."""
    wrong = []
    for group in site.nodes:
        fitting = [
            node
            for node in nodes
            if node.resources.get("CPU", 0) >= group.cpus and node.resources.get("GPU", 0) >= group.gpus
        ]
        marked = [node for node in fitting if node.resources.get(group.resource)]
        is_used = any(own.nodes == group.name for own in site.resources.every)
        if len(fitting) < group.count:
            wrong.append(
                f"group {group.name} promises {group.count} nodes of {group.cpus} CPUs and {group.gpus} "
                f"GPUs, {len(fitting)} have them"
            )
        elif is_used and len(marked) < group.count:
            wrong.append(
                f"{len(marked)} of the {group.count} nodes of group {group.name} have the Ray resource "
                f"{group.resource} that marks it"
            )
    promised = sum(group.count for group in site.nodes)
    if promised > len(nodes):
        wrong.append(f"the groups promise {promised} nodes together, the cluster has {len(nodes)}")
    for node in nodes:
        gpus = int(node.resources.get("GPU", 0))
        if gpus > facts[node.id]["gpus"]:
            wrong.append(f"{node.address} gives out {gpus} GPUs, its driver shows {facts[node.id]['gpus']}")
    for own in site.resources.of_trainings:
        room = num_fitting(nodes, own.per_process)
        if room < own.workers:
            needs = ", ".join(f"{need:g} {name}" for name, need in own.per_process.items())
            wrong.append(f"resources.workers={own.workers}: {room} processes of {needs} fit on the nodes")
    if wrong:
        remedy = "correct nodes and resources in the site, or wait for the missing nodes"
        return failed("resources", _listed(wrong), remedy)
    total = {name: sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    return passed("resources", f"{total['CPU']:g} CPUs and {total['GPU']:g} GPUs on {len(nodes)} nodes")


def _storage(site: Site, nodes: list[Node]) -> CheckResult:
    """Let each node write a file, and the node after it read that."""
    folder = Path(os.path.abspath(site.storage), f".site-check-{secrets.token_hex(4)}")
    site.storage.mkdir(parents=True, exist_ok=True)
    field = "work" if site.remote else "storage"
    files = {node.id: str(folder / f"{number}.txt") for number, node in enumerate(nodes)}
    remedy = f"set {field} to a folder that all nodes share, and that the user of the job may write"
    try:
        for node in nodes:
            fault = node.call(in_node.write_file, files[node.id], node.id)
            if fault:
                return failed("storage", f"{node.address} cannot write to {site.storage}: {fault}", remedy)
        for writer, reader in zip(nodes, [*nodes[1:], *nodes[:1]], strict=True):
            if reader.call(in_node.read_file, files[writer.id]) != writer.id:
                detail = f"{reader.address} does not see in {site.storage} what {writer.address} wrote there"
                return failed("storage", detail, remedy)
        if Path(files[nodes[0].id]).read_text() != nodes[0].id:
            return failed("storage", f"the driver does not see what {nodes[0].address} wrote", remedy)
    except (OSError, RayError) as error:
        return failed("storage", one_line(error), remedy)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return passed("storage", f"{site.storage} is written and read by all nodes")


def _clocks(nodes: list[Node]) -> CheckResult:
    """Compare each node's clock with this one's, at the middle of a question."""
    worst = (0.0, "")
    for node in nodes:
        node.call(in_node.now)  # starts the worker
        asked = time.time()
        then = node.call(in_node.now)
        answered = time.time()
        offset = then - (asked + answered) / 2
        uncertain = (answered - asked) / 2
        if abs(offset) - uncertain > abs(worst[0]):
            worst = (offset, node.address)
    if abs(worst[0]) > _MAX_CLOCK_OFFSET_S:
        detail = f"the clock of {worst[1]} is off by {worst[0]:+.1f} s"
        return failed("clocks", detail, "let NTP set the clocks of all nodes")
    return passed("clocks", f"at most {abs(worst[0]):.2f} s apart")


def _free_disk(nodes: list[Node], facts: dict[str, dict[str, Any]]) -> CheckResult:
    short: list[str] = []
    least: dict[str, int] = {}
    for node in nodes:
        for path, free in facts[node.id]["free"].items():
            if free is not None:
                least[path] = min(free, least.get(path, free))
                if free < _MIN_FREE:
                    short.append(f"{path} on {node.address} has {free / _GIB:.2f} GiB free")
    if short:
        remedy = "free some space there; checkpoints of 8B weights have 100 GiB"
        return failed("free disk", _listed(short), remedy)
    shown = ", ".join(f"{path} {free / _GIB:.0f} GiB" for path, free in least.items())
    return passed("free disk", shown)


def _listed(faults: list[str]) -> str:
    more = f" (and {len(faults) - 1} more)" if faults[1:] else ""
    return faults[0] + more
