"""An all-reduce over as many processes as a training has ranks, with its bandwidth."""

from __future__ import annotations

from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.process_environment import process_environment
from cluster.site import Site
from cluster.site_checks import rank
from cluster.site_checks.nodes import nodes_of_cluster, num_fitting
from cluster.site_checks.report import CheckResult, failed, passed, skipped
from vico.errors import last_line, one_line

cloudpickle.register_pickle_by_value(rank)
_START_TIMEOUT_S = 180.0
_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}


def check_all_reduce(site: Site) -> CheckResult:
    """Return whether the ranks of a training can sum a tensor, and how fast."""
    resources = max(site.resources.every, key=lambda own: (own.gpus_per_worker, own.workers))
    backend = "nccl" if resources.gpus_per_worker else "gloo"
    room = num_fitting(nodes_of_cluster(), resources.per_process)
    if room < resources.workers:
        return skipped("all-reduce", f"{room} of {resources.workers} processes fit on the nodes")
    environment = {**process_environment(resources), **site.environment}
    group = placement_group([resources.per_process] * resources.workers, strategy="PACK")
    try:
        if not group.wait(_START_TIMEOUT_S):
            detail = f"{resources.workers} processes of {resources.per_process} found no room"
            return failed("all-reduce", detail, "lower resources.workers, or wait until nodes are free")
        ranks = [
            ray.remote(rank.Rank)
            .options(
                num_cpus=resources.threads_per_worker,
                num_gpus=resources.gpus_per_worker,
                resources=resources.placement,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
                runtime_env={"env_vars": environment},
            )
            .remote(number, resources.workers)
            for number in range(resources.workers)
        ]
        seconds = _measured(ranks, backend)
    except RayError as error:
        return failed(
            "all-reduce",
            last_line(one_line(error, max_chars=None)),
            "let nodes reach each other on all ports; name the network in environment (NCCL_SOCKET_IFNAME, "
            "GLOO_SOCKET_IFNAME), and set NCCL_DEBUG: INFO to see more",
        )
    finally:
        remove_placement_group(group)
    size, num = _BYTES[backend], resources.workers
    gbps = 2 * (num - 1) / num * size / seconds / 1e9
    return passed("all-reduce", f"{num} ranks, {backend}, {size >> 20} MiB: {gbps:.2f} GB/s of bus bandwidth")


def _measured(ranks: list[Any], backend: str) -> float:
    """Return the seconds of one all-reduce, the slowest rank's."""
    address = ray.get(ranks[0].address.remote(), timeout=_START_TIMEOUT_S)
    seconds = [worker.seconds.remote(address, backend, _BYTES[backend]) for worker in ranks]
    return max(ray.get(seconds, timeout=_START_TIMEOUT_S))
