"""What runs on every node of a cluster that is checked.

Nodes get these functions by value, and may have another vico or none: nothing of the project is imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any


def facts(storage: str) -> dict[str, Any]:
    """Return versions, GPUs, free bytes and the time of this node."""
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "ray": _version("ray"),
        "torch": _version("torch"),
        "gpus": _gpus(),
        "free": {path: _free(path) for path in (storage, os.environ.get("RAY_TMPDIR", "/tmp"), "/dev/shm")},
    }


def now() -> float:
    return time.time()


def write_file(path: str, content: str) -> str:
    """Write a file into a folder that must exist; return why it cannot be written, "" if it can."""
    if not os.path.isdir(os.path.dirname(os.path.dirname(path))):
        return "the folder does not exist"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def read_file(path: str) -> str:
    """Return the content of a file; "" if it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _gpus() -> int:
    """Return the number of GPUs that the driver of this node shows."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len([line for line in listed.stdout.splitlines() if line.startswith("GPU ")])


def _free(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
