"""The Ray Serve application of a server: started with it, on the Ray of its site, and deleted with it.

    client -> HTTP side, limits, prompts (`vico serve`) -> handle of Ray Serve -> replica: engine, model

Ray Serve places the replicas, checks their health, replaces those that die, and gives each job to one of two
replicas that has fewer. Its own HTTP proxy is not started: `vico serve` keeps its limits, keys and errors.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve

from cluster.process_environment import process_environment
from cluster.ray_session import ray_session, worker_environment
from cluster.sources.driver import driver_code
from pipeline.serving.http.access import OPEN
from pipeline.serving.replicas.replica import Replica
from pipeline.serving.start.engine import Answering
from pipeline.serving.start.settings import ReplicaOptions, ServerSettings
from vico.errors import UserError, last_line

_DEPLOYMENT = "replica"
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 30.0


@dataclass(frozen=True)
class Application:
    """A running application: its handle, and how many of its replicas run."""

    name: str
    handle: Any

    def num_running(self) -> int:
        """Return the number of replicas that can answer."""
        application = serve.status().applications.get(self.name)
        if application is None:
            return 0
        states = application.deployments[_DEPLOYMENT].replica_states
        return sum(number for state, number in states.items() if state == "RUNNING")


@contextmanager
def application(name: str, answering: Answering, settings: ServerSettings) -> Iterator[Application]:
    """Run the replicas of a server until the end of the block. `name` is unique in the cluster.

    An application of this name that another server left is replaced. Raises UserError if the cluster has
    too little for the replicas, or they do not start.
    """
    options = settings.replicas
    assert options is not None
    with ray_session(options.site):
        _refuse_small_cluster(options, settings.device)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it reports each step of a start
        resources = options.site.resources
        deployment: Any = serve.deployment(  # its stubs know only the decorator
            Replica,
            name=_DEPLOYMENT,
            num_replicas=options.number,
            max_ongoing_requests=answering.limits.waiting,
            health_check_period_s=_HEALTH_PERIOD_S,
            health_check_timeout_s=_HEALTH_TIMEOUT_S,
            graceful_shutdown_timeout_s=answering.limits.drain_s,
            ray_actor_options={
                "num_cpus": resources.threads_per_worker,
                "num_gpus": resources.gpus_per_worker,
                "resources": resources.placement,
                "runtime_env": {
                    "env_vars": worker_environment(options.site, local=_is_local(options))
                    | process_environment(resources)
                },
            },
        )
        try:
            serve.start(proxy_location="Disabled")
            # without the keys: Ray Serve keeps these arguments, and its dashboard shows them
            own = replace(settings, access=OPEN)
            bound = deployment.bind(driver_code()["digest"], answering, own)
            handle = serve.run(bound, name=name, route_prefix=None)
        except RuntimeError as error:
            raise UserError(
                f"--replicas={options.number}: they do not start: {last_line(str(error))}"
            ) from error
        try:
            yield Application(name, handle.options(stream=True))
        finally:
            serve.delete(name)


def _is_local(options: ReplicaOptions) -> bool:
    return len(ray.nodes()) == 1 and options.site.ray.address is None


def _refuse_small_cluster(options: ReplicaOptions, device: str) -> None:
    """Raise UserError if the replicas would wait for CPUs or GPUs for ever."""
    resources = options.site.resources
    if ":" in device:
        raise UserError(f"--device={device}: Ray chooses the GPU of each replica; give --device cuda")
    if device.startswith("cuda") != (resources.gpus_per_worker > 0):
        raise UserError(
            f"--device={device} with resources.gpus_per_worker={resources.gpus_per_worker:g} of site "
            f"{options.site.name}: replicas on GPUs need --device cuda and a share of a GPU each"
        )
    available = ray.cluster_resources()
    for kind, each in resources.per_process.items():
        have = available.get(kind, 0)
        if have < options.number * each:
            raise UserError(
                f"--replicas={options.number} need {options.number * each:g} {kind}, Ray has {have:g}; give "
                "fewer replicas, or a site with more (`ray.num_cpus` of a local Ray)"
            )
