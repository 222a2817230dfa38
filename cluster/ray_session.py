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
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster.project import PROJECT_FOLDER
from cluster.ray_folder import temporary_ray_folder
from cluster.site import Site
from vico.errors import UserError

# Ray reads them when it is imported or started. Under `uv run` it would build an environment for its workers.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
logger = logging.getLogger(__name__)
NAMESPACE = "vico"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job."""
_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def ray_session(site: Site) -> Iterator[None]:
    """Provide Ray for the body: at RAY_ADDRESS, else at `ray.address`, else a local Ray.

    RAY_ADDRESS is set inside a submitted job. Does nothing when Ray is already initialized, for example by an
    outer session. A local Ray is stopped at the end; it also ends when this process is killed. Enter the
    outermost session in the main thread: on Linux the processes of a local Ray die with the thread that
    started them.

    Raises UserError when the cluster does not answer or a port is in use.
    """
    if ray.is_initialized():
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the outermost ray_session must be entered in the main thread")
    address = os.environ.get("RAY_ADDRESS") or site.ray.address
    with ExitStack() as stack:
        if address:
            stack.callback(ray.shutdown)
            join(address, site)
        else:
            folder = stack.enter_context(temporary_ray_folder(site.ray.temp_dir))
            stack.callback(ray.shutdown)
            start_local(folder, site)
        yield


def join(address: str, site: Site) -> None:
    """Connect to the cluster at `address`; warn when it has fewer CPUs than `resources.workers` needs."""
    source = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "ray.address"
    if "://" in address:
        raise UserError(
            f"{source}={address} is not the address of a cluster (HOST:PORT, or auto); unset {source} to use "
            "a local Ray, or name a Ray Jobs server in jobs.address for `vico submit`"
        )
    no_answer = UserError(
        f"{source}={address}: no Ray cluster answers there; start one with `ray start --head`, "
        f"or unset {source} to use a local Ray"
    )
    host, colon, port = address.rpartition(":")
    if colon:
        # Without this check Ray would try forever.
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise no_answer from error
    try:
        init(site, address)
    except ConnectionError as error:
        raise no_answer from error
    available = ray.cluster_resources().get("CPU", 0)
    needed = site.resources.workers * site.resources.threads_per_worker
    if available < needed:
        logger.warning(
            "the cluster at %s has %d CPUs, resources.workers=%d needs %d: training waits until it grows",
            address,
            available,
            site.resources.workers,
            needed,
        )


def start_local(folder: Path, site: Site) -> None:
    """Start a Ray on this machine that keeps its sockets and logs in `folder`."""
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
    init(
        site,
        "local",
        num_cpus=site.ray.num_cpus,
        include_dashboard=site.ray.dashboard,
        dashboard_port=site.ray.dashboard_port,
        _temp_dir=str(folder),
    )


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
        "OMP_NUM_THREADS": str(site.resources.threads_per_worker),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")
        or str(Path(sys.prefix, "torch_extensions")),
        "MLFLOW_RUN_ID": "",  # MLflow would write into that run, whatever parent run it is given
    }
    if not site.resources.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""  # torch would use GPUs that are not reserved
    if local:
        # DeepSpeed calls ninja, which is beside python; on PATH it is only in an activated environment.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if JOB_VARIABLE not in os.environ and not is_installed():
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(PROJECT_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    return environment


def is_installed() -> bool:
    """Return whether the project was installed as a wheel rather than run from a checkout."""
    return PROJECT_FOLDER in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))


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
