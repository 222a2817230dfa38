"""A local Ray: its temporary folder, the time limit of its start, and the logs of a start that failed."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray._private import services

from vico.errors import UserError, one_line
from vico.own_files import is_own_folder, no_links

logger = logging.getLogger(__name__)
FOLDER_PREFIX = "vico-ray-"
OWNER_FILE = "owner.lock"
# The path of a socket has at most 107 bytes; Ray appends /session_<date>_<time>_<pid>/sockets/plasma_store.
# In our folder Ray gets one of its own, which it opens to everybody: ours keeps others out.
RAY_FOLDER = "r"
LONGEST_FOLDER = 107 - 66 - len(f"/{RAY_FOLDER}")
_WAITS_S = ("RAY_gcs_server_port_wait_time_s",)
_WAITS_MS = ("RAY_agent_register_timeout_ms",)
"""Ray's own limits for parts of a start, of 10 to 30 s each."""
_RAYLET_WAIT = "RAY_raylet_start_wait_time_s"
"""How long one question for the raylet waits in Ray."""
_ASK_EVERY_S = 2
_SHORTEST_WAIT_S = 30
_MAX_STARTS = 3
_CHECK_S = 1.0
_GRACE_S = 5.0


@contextmanager
def temporary_ray_folder(parent: Path | None) -> Iterator[Path]:
    """Create a folder in `parent` (None: the system's folder for temporary files) that only this user can
    enter, and remove it at the end. Ray gets the folder RAY_FOLDER in it.

    Also removes the folders that killed sessions left in `parent`. Raises UserError when the path is too long
    for Ray's sockets or the folder cannot be created.
    """
    folder = _new_folder(parent)
    with open(folder / f".{OWNER_FILE}", "x", opener=no_links) as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(folder / f".{OWNER_FILE}", folder / OWNER_FILE)  # visible to others once locked
        remove_abandoned_folders(folder.parent)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _new_folder(configured_parent: Path | None) -> Path:
    parent = configured_parent or Path(tempfile.gettempdir())
    longest = LONGEST_FOLDER - len(FOLDER_PREFIX) - 9
    if len(os.fsencode(parent)) > longest:
        if configured_parent is not None:
            raise UserError(
                f"ray.temp_dir={parent}: the path is too long for Ray's sockets; "
                f"give one of at most {longest} bytes, or null"
            )
        parent = Path("/tmp")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    except OSError as error:
        raise UserError(
            f"ray.temp_dir={parent}: is not writable ({error.strerror}); give another folder"
        ) from error


def remove_abandoned_folders(parent: Path) -> None:
    """Remove this user's folders whose owner has died and so has lost its lock."""
    for folder in filter(is_own_folder, parent.glob(f"{FOLDER_PREFIX}*")):
        try:
            with open(folder / OWNER_FILE, opener=no_links) as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, UserError):
            continue  # in use, just being created, or not our folder in spite of its name


class _RayletEnded(Exception):
    """The raylet has ended before it was ready. It gives its agents 15 s to start, a limit that no setting
    changes and that a busy machine misses."""


def start_in_time(folder: Path, timeout_s: float, start: Callable[[], None]) -> None:
    """Call `start`, which starts the Ray in `folder`, and give each of its processes `timeout_s` to start.

    If the raylet ends, the start is repeated. Raises UserError after a timeout or any other failure: what was
    waited for, for how long, and where the logs are. The processes are then killed.
    """
    began_s = time.monotonic()
    for number in range(1, _MAX_STARTS + 1):
        watch = _Watch(folder, timeout_s)
        try:
            with watch, _patient_ray(folder, timeout_s):
                start()
            return
        except UserError:
            raise
        except _RayletEnded as error:
            end_processes(folder)
            if number == _MAX_STARTS or time.monotonic() - began_s > timeout_s:
                line = watch.failed_line(f"its raylet has ended in each of {number} starts")
                raise UserError(line) from error
            logger.warning("the raylet of the local Ray has ended during the start; Ray is started again")
        except Exception as error:
            line = watch.late_line() if watch.waited_s >= timeout_s else watch.failed_line(one_line(error))
            end_processes(folder)
            raise UserError(line) from error


class _Watch:
    """A thread that ends this process if a start hangs in Ray's own code.

    Ray waits for its processes within the limits of `_patient_ray` and raises. But its calls to a GCS server
    that has stopped or ended do not return, and after a minute they end this process without a line.
    """

    def __init__(self, folder: Path, timeout_s: float):
        self._folder, self._timeout_s = folder, timeout_s
        self._started_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._end_if_it_hangs, name="ray-start", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._started_s

    def late_line(self) -> str:
        """Return which process was late, as `failed_line` does."""
        missing = "its raylet" if "raylet" in _names(self._folder) else "its GCS server"
        return self.failed_line(
            f"{missing} was not ready after {self.waited_s:.0f} s; raise "
            f"ray.start_timeout_s={self._timeout_s:g} in the site if the machine is slow"
        )

    def failed_line(self, reason: str) -> str:
        """Return why the start failed and where the logs are. Moves them out of the folder."""
        return f"a local Ray did not start: {reason}; its logs are in {_kept_logs(self._folder)}"

    def _end_if_it_hangs(self) -> None:
        had_server = False
        while not self._ended.wait(_CHECK_S):
            has_server = "gcs_server" in _names(self._folder)
            if had_server and not has_server:
                if not self._ended.wait(_GRACE_S):
                    self._end(self.failed_line("its GCS server has ended"))
            elif self.waited_s > 2 * self._timeout_s + _GRACE_S:
                self._end(self.late_line())
            had_server = has_server

    def _end(self, line: str) -> None:
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
        end_processes(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(2)


@contextmanager
def _patient_ray(folder: Path, timeout_s: float) -> Iterator[None]:
    """Set the limits of Ray itself to `timeout_s`, and raise _RayletEnded in the body if its raylet ends."""
    wait_s, agent_wait_s = math.ceil(timeout_s), max(math.ceil(timeout_s), _SHORTEST_WAIT_S)
    limits = {
        **dict.fromkeys(_WAITS_S, str(wait_s)),
        _RAYLET_WAIT: str(_ASK_EVERY_S),
        # without its agents a raylet ends, also after the start
        **dict.fromkeys(_WAITS_MS, str(1000 * agent_wait_s)),
    }
    before = {name: os.environ.get(name) for name in limits}
    get_node, deadline = services.get_node, time.monotonic() + timeout_s

    def get_node_in_time(*arguments: Any) -> Any:
        # Ray asks for 30 s whether the raylet has registered; that limit has no setting.
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(one_line(error)) from error
                if "raylet" not in _names(folder):
                    raise _RayletEnded from error
            time.sleep(0.1)

    os.environ.update(limits)
    services.get_node = get_node_in_time
    try:
        yield
    finally:
        services.get_node = get_node
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def ray_processes(folder: Path) -> list[psutil.Process]:
    """Return the processes below this one that have the folder of a Ray in their arguments."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(str(folder) in argument for argument in process.cmdline()):
                processes.append(process)
        except psutil.Error:
            continue  # it has ended meanwhile
    return processes


def _names(folder: Path) -> set[str]:
    return {process.name() for process in ray_processes(folder)}


def end_processes(folder: Path) -> None:
    """Kill what a failed start left running; Ray itself would leave it until this process ends."""
    for process in ray_processes(folder):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _kept_logs(folder: Path) -> Path:
    """Move the logs of a Ray out of its folder, which is removed, and return where they are."""
    kept = Path(tempfile.mkdtemp(prefix="vico-failed-ray-", dir=folder.parent))
    for logs in folder.glob(f"{RAY_FOLDER}/session_*/logs"):
        if not logs.parent.is_symlink():
            shutil.move(logs, kept / logs.parent.name)
    return kept
