"""The Ray Serve application of a server: started with it, on the Ray of its site, and deleted with it.

    client -> HTTP side, limits, prompts (`vico serve`) -> handle of Ray Serve -> replica: engine, model

Ray Serve places the replicas, checks their health, replaces those that die, and gives each job to one of two
replicas that has fewer. Its own HTTP proxy is not started: `vico serve` keeps its limits, keys and errors.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from cluster.process_environment import process_environment
from cluster.ray_session import is_local, ray_session, worker_environment
from cluster.sources.driver import driver_code
from pipeline.serving.http.access import OPEN
from pipeline.serving.replicas.lease import lease
from pipeline.serving.replicas.replica import REFUSAL, Expected, Replica
from pipeline.serving.replicas.room import refuse_small_cluster
from pipeline.serving.replicas.stop import stop_signals
from pipeline.serving.start.engine import Answering
from pipeline.serving.start.model_digest import model_digest
from pipeline.serving.start.settings import ServerSettings
from vico.errors import UserError, last_line, one_line

logger = logging.getLogger(__name__)

_DEPLOYMENT = "replica"
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 30.0
_MOST_STARTS = 3
"""How often Ray Serve tries before it gives up, if no replica has ever run."""
_POLL_S = 0.5


@dataclass(frozen=True)
class State:
    """How many replicas run, whether these are all, and what Ray Serve says about the others."""

    num_running: int
    is_whole: bool = False
    is_failed: bool = False
    message: str = ""

    @property
    def reason(self) -> str:
        """Return in one line why replicas are missing: what a replica says, else what Ray Serve says."""
        _, refusal, reason = self.message.rpartition(REFUSAL)
        if refusal:
            return reason.strip().partition("\n")[0]
        return last_line(self.message) if "Error:\n" in self.message else one_line(self.message)


class Application:
    """The replicas of a server. `handle` takes jobs once they were asked for with `deploy`."""

    handle: Any

    def __init__(self, name: str, bound: Any, number: int):
        self.name, self.number = name, number
        self._bound = bound

    def deploy(self) -> None:
        """Ask Ray Serve for the replicas, and start it if it does not run. Does not wait for them."""
        connect()
        target = serve.RunTarget(target=self._bound, name=self.name, route_prefix=None)
        [handle] = serve.run_many([target], wait_for_applications_running=False)
        self.handle = handle.options(stream=True)

    def state(self) -> State | None:
        """Return what Ray Serve says; None if it does not know the application. Raises what Ray raises."""
        status = serve.status().applications.get(self.name)
        if status is None:
            return None
        deployment = status.deployments.get(_DEPLOYMENT)
        if deployment is None:  # it was asked for a moment ago
            return State(0)
        num_running = sum(n for state, n in deployment.replica_states.items() if state == "RUNNING")
        is_failed = status.status == ApplicationStatus.DEPLOY_FAILED
        message = deployment.message or (status.message if is_failed else "")
        is_whole = status.status == ApplicationStatus.RUNNING
        return State(num_running, is_whole, is_failed, "" if is_whole else message)

    def await_replicas(self) -> None:
        """Return when all replicas run. What delays them is logged, each reason once.

        Raises UserError if one of them says that it cannot start, or none starts: Ray Serve would go on
        trying for ever if others run.
        """
        logged = ""
        while True:
            state = self.state()
            if state is None:
                raise UserError(f"--replicas={self.number}: they were deleted while they started")
            if state.is_whole:
                return
            if state.is_failed or REFUSAL in state.message:
                raise UserError(f"--replicas={self.number}: they do not start: {state.reason}")
            if state.reason not in ("", logged):
                logged = state.reason
                logger.warning("%d of %d replicas run: %s", state.num_running, self.number, logged)
            time.sleep(_POLL_S)

    def delete(self) -> None:
        """Delete the replicas and wait for their end; log it if they do not end."""
        try:
            serve.delete(self.name)
        except Exception as error:  # Ray Serve or all of Ray may be gone, and the replicas with it
            logger.error(
                "the replicas %s were not deleted: %s; if they run, `serve shutdown` ends them",
                self.name,
                one_line(error),
            )


@contextmanager
def application(name: str, answering: Answering, settings: ServerSettings) -> Iterator[Application]:
    """Run the replicas of a server until the end of the block. `name` is unique in the cluster.

    An application of this name that a killed server left is replaced. Raises UserError if the cluster has
    too little for the replicas, they do not start, or the name belongs to another server.
    """
    options = settings.replicas
    assert options is not None
    # Ray runs workers with niceness 15: other programs of this machine would come before every answer.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with stop_signals(), ray_session(options.site):
        refuse_small_cluster(options, settings.device)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it reports each step of a start
        running = Application(name, _bound(name, answering, settings), options.number)
        with _start_errors(options.number):
            connect()
        with lease(name):
            if running.state() is not None:
                running.delete()
            try:
                with _start_errors(options.number):
                    running.deploy()
                    running.await_replicas()
                yield running
            finally:
                running.delete()


@contextmanager
def _start_errors(number: int) -> Iterator[None]:
    """Turn what Ray raises while it starts replicas into a UserError."""
    try:
        yield
    except (RuntimeError, TimeoutError, RayError, RayServeException) as error:
        raise UserError(f"--replicas={number}: Ray Serve does not start: {last_line(str(error))}") from error


def connect() -> None:
    """Find the cluster's Ray Serve, or start it."""
    serve.start(proxy_location="Disabled")


def _bound(name: str, answering: Answering, settings: ServerSettings) -> Any:
    """Return what Ray Serve runs: the replica's class with its arguments, and what each replica takes."""
    options = settings.replicas
    assert options is not None
    resources = options.site.resources
    environment = worker_environment(options.site, local=is_local(options.site))
    deployment: Any = serve.deployment(  # its stubs know only the decorator
        Replica,
        name=_DEPLOYMENT,
        num_replicas=options.number,
        max_ongoing_requests=answering.limits.waiting,
        max_constructor_retry_count=_MOST_STARTS,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=answering.limits.drain_s,
        ray_actor_options={
            "num_cpus": resources.threads_per_worker,
            "num_gpus": resources.gpus_per_worker,
            "resources": resources.placement,
            "runtime_env": {"env_vars": environment | process_environment(resources)},
        },
    )
    # without the keys: Ray Serve keeps these arguments, and its dashboard shows them
    own = replace(settings, access=OPEN)
    expected = Expected(driver_code()["digest"], model_digest(answering.folder))
    return deployment.bind(name, expected, answering, own)
