"""What is recorded beside a result and never decides it: git commit, packages, machine, and some of the
site."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from functools import cache
from hashlib import sha256
from typing import Any

from cluster.project import PROJECT_FOLDER
from cluster.site import Site

_RAYS_OWN = os.path.join("ray", "thirdparty_files")
PACKAGED_GIT_FILE, PACKAGED_PATCH_FILE = "submitted/git.json", "submitted/git.patch"
"""In the package of a submitted job: `git_state` and `git_patch` of the machine that packed it."""
PATCH_FILE = "sources.patch"
"""In an attempt's folder if tracked files differed from the commit: `git_patch`."""


@cache
def git_state() -> dict[str, Any]:
    """Return `commit` of the checkout that this code runs from or was packed from, and `dirty`: whether
    tracked files differ from it. Both are None for an installed wheel."""
    packaged = PROJECT_FOLDER / PACKAGED_GIT_FILE
    if packaged.is_file():
        return json.loads(packaged.read_text(encoding="utf-8"))
    this_file = os.path.relpath(__file__, PROJECT_FOLDER)
    if _git("ls-files", "--error-unmatch", this_file) is None:
        return {"commit": None, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


@cache
def git_patch() -> str | None:
    """Return how tracked files differ from the commit, as input of `git apply`; None if they do not."""
    packaged = PROJECT_FOLDER / PACKAGED_PATCH_FILE
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    if not git_state()["dirty"]:
        return None
    patch = _git("diff", "--binary", "HEAD")
    return None if patch is None else patch + "\n"


def git_state_with_patch() -> dict[str, Any]:
    """Return `git_state`, with the sha256 of `git_patch` as `patch` if tracked files differ from the
    commit."""
    patch = git_patch()
    return git_state() if patch is None else {**git_state(), "patch": sha256(patch.encode()).hexdigest()}


def has_commit(commit: str) -> bool | None:
    """Return whether the checkout that this code runs from has the commit; None without a checkout."""
    if _git("rev-parse", "--git-dir") is None:
        return None
    return _git("cat-file", "-e", f"{commit}^{{commit}}") is not None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PROJECT_FOLDER), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


@cache
def package_versions() -> dict[str, str]:
    """Return the version of every installed distribution; of one that is on the path twice, the first.

    Distributions inside Ray's own folder are left out: importing Ray puts them on the path, and the same
    environment would look different before and after.
    """
    path = [folder for folder in sys.path if not folder.endswith(_RAYS_OWN)]
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=path):
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(name.lower().replace("_", "-"), distribution.version)
    return dict(sorted(versions.items()))


@cache
def locked_versions() -> dict[str, str]:
    """Return the versions that constraints.txt pins, by package; nothing for an installed wheel."""
    path = PROJECT_FOLDER / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().lower().replace("_", "-"): version.strip() for name, _, version in pins}


def run_environment(site: Site) -> dict[str, Any]:
    """Return where a stage runs: the machine, and settings of the site that change only the speed.

    No address, path or credential is in it.
    """
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "resources": site.resources.model_dump(mode="json"),
        "train": site.train.model_dump(mode="json"),
    }
