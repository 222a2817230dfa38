"""Start Ray on this machine, or join a cluster, for the duration of a command.

The runner enters a session before the first stage that runs; stages enter it again.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from cluster.process_environment import session_environment
from cluster.project import PROJECT_FOLDER
from cluster.ray_start.address import refuse_no_cluster, refused_token
from cluster.ray_start.local import RAY_FOLDER, start_in_time, temporary_ray_folder
from cluster.settings.blocks import Resources
from cluster.site import Site
from cluster.sources.by_value import refuse_other_code
from cluster.sources.driver import driver_code, is_installed, python_path
from vico.errors import UserError, last_line

# Ray reads them when it is imported or started. Under `uv run` it would build an environment for its workers.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
logger = logging.getLogger(__name__)
NAMESPACE = "vico"
_PACKAGES_OF_JOBS = "working_dir_files"
"""The folder of each node into which Ray unpacks the package of a job; it is on every worker's path."""
_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def ray_session(site: Site) -> Iterator[None]:
    """Provide Ray for the body: at RAY_ADDRESS, else at `ray.address`, else a local Ray.

    RAY_ADDRESS is set inside a submitted job. Does nothing when Ray is already initialized, for example by an
    outer session. A local Ray is stopped at the end; it also ends when this process is killed. Enter the
    outermost session in the main thread: on Linux the processes of a local Ray die with the thread that
    started them.

    Raises UserError when the cluster does not answer, a port is in use, a local Ray does not start in time,
    or workers import other code than this process.
    """
    if ray.is_initialized():
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the outermost ray_session must be entered in the main thread")
    address = _address(site)
    if address is None and not os.environ.get("RAY_ADDRESS") and site.kind in ("kuberay", "slurm"):
        raise UserError(
            f"site {site.name} is of kind {site.kind}: its nodes exist only inside a job; use `vico "
            "submit`, or a site of kind local or ray"
        )
    driver_code()  # refused before Ray starts
    with ExitStack() as stack:
        if address is not None:
            stack.callback(ray.shutdown)
            join(address, site)
        else:
            folder = stack.enter_context(temporary_ray_folder(site.ray.temp_dir))
            stack.callback(ray.shutdown)
            start_local(folder, site)
        refuse_other_code()
        yield


def is_local(site: Site) -> bool:
    """Return whether `ray_session` starts a Ray on this machine for this site."""
    return _address(site) is None


def _address(site: Site) -> str | None:
    """Return the address of the cluster to join; None: a local Ray is started."""
    address = os.environ.get("RAY_ADDRESS") or site.ray.address
    return None if address in (None, "", "local") else address


def join(address: str, site: Site) -> None:
    """Connect to the cluster at `address`; warn when it has too few CPUs or GPUs for `resources.workers`."""
    source = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "ray.address"
    try:
        refuse_no_cluster(source, address)
        init(site, address)
    except AuthenticationError as error:
        raise refused_token(source, address) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"{source}={address}: this machine cannot join: {last_line(str(error.__cause__ or error))}; "
            f"`ray start --address={address}` makes it a part, without {source} a local Ray is used"
        ) from error
    for lack in lacking(ray.cluster_resources(), site.resources):
        logger.warning("the cluster at %s %s: a training waits until it grows", address, lack)


def lacking(available: Mapping[str, float], resources: Resources) -> list[str]:
    """Return what a cluster lacks of CPUs and GPUs for the ranks of a training, one clause per kind."""
    clauses = []
    for kind in ("CPU", "GPU"):
        have = available.get(kind, 0)
        needs = [(own.workers * own.per_process.get(kind, 0), own.workers) for own in resources.of_trainings]
        needed, workers = max(needs)
        if have < needed:
            clauses.append(f"has {have:g} {kind}s, resources.workers={workers} need {needed:g}")
    return clauses


def start_local(folder: Path, site: Site) -> None:
    """Start a Ray on this machine that keeps its sockets and logs in a folder of its own in `folder`."""
    try:
        site.check_local_ray()  # a site that is only for submitting may ask for more
    except ValueError as error:
        raise UserError(f"site {site.name}: {error}") from error
    if site.ray.dashboard_port is not None:
        refuse_port_in_use("ray.dashboard_port", site.ray.dashboard_port)
    if not site.ray.dashboard and not any(name in os.environ for name in _AUTH_VARIABLES):
        # Otherwise Ray writes a token to the home folder. Without a dashboard only our processes need it.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it logs that it uses a token
    options = {
        "num_cpus": site.ray.num_cpus,
        "include_dashboard": site.ray.dashboard,
        "dashboard_port": site.ray.dashboard_port,
        "_temp_dir": str(folder / RAY_FOLDER),
    }
    start_in_time(folder, site.ray.start_timeout_s, lambda: init(site, "local", **options))


def init(site: Site, address: str, **options: Any) -> None:
    """Call `ray.init` with the workers' environment and `options`, and keep our handler of SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    try:
        context = ray.init(
            address,
            namespace=NAMESPACE,
            log_to_driver=False,  # ranks and tasks write their own files
            logging_level=logging.WARNING,
            job_config=_JobWithoutFolders(),
            runtime_env={"env_vars": worker_environment(site, local=address == "local")},
            **options,
        )
    finally:
        signal.signal(signal.SIGTERM, handler)
    logger.info("Ray at %s after %.1f s", address, time.monotonic() - started)
    if context.dashboard_url:
        logger.info("Ray dashboard: http://%s", context.dashboard_url)


def worker_environment(site: Site, *, local: bool) -> dict[str, str]:
    """Return the environment variables that every worker process gets."""
    environment = {
        **session_environment(site.resources),
        **site.environment,
        "TORCH_EXTENSIONS_DIR": os.path.abspath(
            os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix, "torch_extensions")
        ),
        "MLFLOW_RUN_ID": "",  # MLflow would write into that run, whatever parent run it is given
    }
    if local:
        # DeepSpeed calls ninja, which is beside python; on PATH it is only in an activated environment.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if _PACKAGES_OF_JOBS not in PROJECT_FOLDER.parts and (local or not is_installed()):
        environment["PYTHONPATH"] = python_path()
    return environment


class _JobWithoutFolders(JobConfig):
    """A job whose workers do not get the driver's working directory and script folder on their path.

    Ray puts both before PYTHONPATH unless the job has a `working_dir`. The working directory may hold another
    checkout, or a file with the name of one of our modules.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def refuse_port_in_use(field: str, port: int) -> None:
    """Raise UserError when another program listens on the port that `field` of the site names."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"{field}={port}: the port is in use on this machine; choose another one, "
                "or null for the first free one"
            ) from error
