"""Starting Ray on this machine, or joining a cluster, for the time of a command.

The runner enters a session before the first stage that runs, the stages enter it again inside.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster.site import Site
from vico.errors import UserError

# Ray reads them when it is imported or started. Under `uv run` it would build its workers an environment.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
logger = logging.getLogger(__name__)
_LOOK_S = 60.0
PROJECT = Path(__file__).resolve().parent.parent
NAMESPACE = "vico"
FOLDER_PREFIX = "vico-ray-"
OWNER_FILE = "owner.lock"
# A socket's path may have 107 bytes; Ray appends /session_<date>_<time>_<pid>/sockets/plasma_store.
LONGEST_FOLDER = 107 - 66
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job


@contextmanager
def ray_session(site: Site) -> Iterator[None]:
    """Ray for the body: RAY_ADDRESS (as inside a submitted job), else `ray.address`, else a local one.

    Within another session, or where Ray is up already, it does nothing. A local Ray is stopped at the end;
    it also goes when this process is killed. Enter the outermost session in the main thread: on Linux the
    processes of a local Ray die with the thread that started them.

    Raises UserError when the cluster is out of reach or a port is in use.
    """
    if ray.is_initialized():
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the outermost ray_session must be entered in the main thread")
    address = os.environ.get("RAY_ADDRESS") or site.ray.address
    with ExitStack() as stack:
        folder = None if address else stack.enter_context(local_folder(site))
        stack.callback(ray.shutdown)
        if address:
            join(address, site)
        else:
            start_local(folder, site)
        yield


def join(address: str, site: Site) -> None:
    source = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "ray.address"
    if "://" in address:
        raise UserError(
            f"{source}={address} is no address of a cluster (HOST:PORT, or auto); unset {source} to use a "
            "local Ray, or name a Ray Jobs server in jobs.address for `vico submit`"
        )
    no_answer = UserError(
        f"{source}={address}: no Ray cluster answers there; start one with `ray start --head`, "
        f"or unset {source} to use a local Ray"
    )
    host, colon, port = address.rpartition(":")
    if colon:
        # Ray itself would try for ever.
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise no_answer from error
    try:
        init(site, address=address)
    except ConnectionError as error:
        raise no_answer from error
    available = ray.cluster_resources().get("CPU", 0)
    wanted = site.resources.workers * site.resources.threads_per_worker
    if available < wanted:
        logger.warning(
            "the cluster at %s has %d CPUs, resources.workers=%d needs %d: training waits until it grows",
            address,
            available,
            site.resources.workers,
            wanted,
        )


def refuse_unseen_folder(field: str, folder: Path) -> None:
    """Raise UserError when a node of the cluster does not see what this process puts into the folder."""
    mark = folder.resolve() / f".seen-{secrets.token_hex(4)}"
    mark.touch()
    try:
        blind = _nodes_without(mark)
    finally:
        mark.unlink()
    if blind:
        raise UserError(
            f"{field}={folder} is not seen by {blind}; set {field} in the site to a folder that all nodes of "
            "the cluster share"
        )


def refuse_unseen_model(folder: Path) -> None:
    """Raise UserError when a node of the cluster does not see the model, whose folder is one of this node."""
    config = folder / "config.json"
    blind = _nodes_without(config) if config.is_file() else ""
    if blind:
        raise UserError(
            f"inputs.model: {folder} is not seen by {blind}; put the model in a folder that all nodes of the "
            "cluster share (for a model of the Hub: set HF_HOME to one)"
        )


def _nodes_without(path: Path) -> str:
    """The first node that has no such file and how many there are, in words; empty if all have it. A node
    that does not answer is let pass: it may be going away just now."""
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return ""
    looks = {
        node["NodeManagerAddress"]: ray.remote(os.path.exists)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(str(path))
        for node in nodes
    }
    blind = []
    for address, look in looks.items():
        try:
            if not ray.get(look, timeout=_LOOK_S):
                blind.append(address)
        except RayError as error:
            reason = " ".join(str(error).split())
            logger.warning("node %s did not say whether it sees %s: %s", address, path, reason)
    return f"node {blind[0]} ({len(blind)} of {len(nodes)} nodes)" if blind else ""


def start_local(folder: Path, site: Site) -> None:
    try:
        site.check_local_ray()  # a site for submitting alone may ask for more
    except ValueError as error:
        raise UserError(f"site {site.name}: {error}") from error
    if site.ray.dashboard_port is not None:
        refuse_port_in_use("ray.dashboard_port", site.ray.dashboard_port)
    if not site.ray.dashboard and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(
        os.environ
    ):
        # Ray would keep one in the home folder; without a dashboard only this process and its workers use it.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # tells that it uses a token
    init(
        site,
        address="local",
        num_cpus=site.ray.num_cpus,
        include_dashboard=site.ray.dashboard,
        dashboard_port=site.ray.dashboard_port,
        _temp_dir=str(folder),
    )


def init(site: Site, **where: Any) -> None:
    """ray.init, with the workers' environment, and without its taking over SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    local = where["address"] == "local"
    started = time.monotonic()
    try:
        context = ray.init(
            namespace=NAMESPACE,
            log_to_driver=False,  # ranks and tasks write files of their own
            logging_level=logging.WARNING,
            runtime_env={"env_vars": worker_environment(site, local=local)},
            **where,
        )
    finally:
        signal.signal(signal.SIGTERM, handler)
    logger.info("Ray at %s after %.1f s", where["address"], time.monotonic() - started)
    if context.dashboard_url:
        logger.info("Ray dashboard: http://%s", context.dashboard_url)


def worker_environment(site: Site, *, local: bool) -> dict[str, str]:
    """The environment variables of every worker process."""
    environment = {
        "OMP_NUM_THREADS": str(site.resources.threads_per_worker),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")
        or str(Path(sys.prefix, "torch_extensions")),
        "MLFLOW_RUN_ID": "",  # MLflow would write into that run, whatever parent it is told
    }
    if not site.resources.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU that nobody asked for, and torch takes it
    if local:
        # DeepSpeed calls ninja, which stands beside python, on PATH only when the environment is activated.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if JOB_VARIABLE not in os.environ and not is_installed():
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    return environment


def is_installed() -> bool:
    """Whether the project was installed as a wheel, and not run from a checkout."""
    return PROJECT in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))


def refuse_port_in_use(field: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"{field}={port}: the port is in use on this machine; choose another one, "
                "or null for the first free one"
            ) from error


@contextmanager
def local_folder(site: Site) -> Iterator[Path]:
    """A fresh folder for a local Ray, removed at the end, as are those that killed processes left."""
    parent = site.ray.temp_dir or Path(tempfile.gettempdir())
    longest = LONGEST_FOLDER - len(FOLDER_PREFIX) - 9
    if len(os.fsencode(parent)) > longest:
        if site.ray.temp_dir is not None:
            raise UserError(
                f"ray.temp_dir={parent}: the path is too long for Ray's sockets; "
                f"give one of at most {longest} bytes, or null"
            )
        parent = Path("/tmp")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    except OSError as error:
        raise UserError(
            f"ray.temp_dir={parent}: cannot be written ({error.strerror}); give another"
        ) from error
    with open(folder / f".{OWNER_FILE}", "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(folder / f".{OWNER_FILE}", folder / OWNER_FILE)  # seen by others only when locked
        remove_left_over(parent)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_left_over(parent: Path) -> None:
    """Remove the folders whose owner is dead: its lock went with it."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            with open(folder / OWNER_FILE) as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use, being made, or another user's
