"""Facts recorded beside a result that never decide it: commit, packages, machine, and what of the site
matters."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from cluster.site import Site

_PROJECT = Path(__file__).resolve().parents[2]
_RAYS_OWN = os.path.join("ray", "thirdparty_files")
PACKAGED_GIT_FILE, PACKAGED_PATCH_FILE = "submitted/git.json", "submitted/git.patch"
"""In the package of a submitted job: what git said where it was packed, and how files differed from that."""
PATCH_FILE = "sources.patch"
"""In an attempt's folder: how tracked files differed from the commit, where they did."""


@cache
def git_state() -> dict[str, Any]:
    """Commit of the checkout this code runs from or was packed from, and whether tracked files differ from
    it; None for an installed wheel."""
    packaged = _PROJECT / PACKAGED_GIT_FILE
    if packaged.is_file():
        return json.loads(packaged.read_text(encoding="utf-8"))
    here = os.path.relpath(__file__, _PROJECT)
    if _git("ls-files", "--error-unmatch", here) is None:
        return {"commit": None, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


@cache
def git_patch() -> str | None:
    """How tracked files differ from the commit, as `git apply` takes it; None where they do not."""
    packaged = _PROJECT / PACKAGED_PATCH_FILE
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    if not git_state()["dirty"]:
        return None
    found = _git("diff", "--binary", "HEAD")
    return None if found is None else found + "\n"


def git_facts() -> dict[str, Any]:
    """`git_state`; where files differ from the commit, with the digest of how."""
    patch = git_patch()
    return git_state() if patch is None else {**git_state(), "patch": sha256(patch.encode()).hexdigest()}


def has_commit(commit: str) -> bool | None:
    """Whether the checkout this code runs from has the commit; None where there is no checkout to ask."""
    if _git("rev-parse", "--git-dir") is None:
        return None
    return _git("cat-file", "-e", f"{commit}^{{commit}}") is not None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_PROJECT), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


@cache
def package_versions() -> dict[str, str]:
    """Every installed distribution with its version; of one that stands on the path twice, the first.

    Copies that Ray carries in itself, and puts on the path once it is imported, are Ray's: with them the same
    environment would look different before and after.
    """
    path = [place for place in sys.path if not place.endswith(_RAYS_OWN)]
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=path):
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return dict(sorted(found.items()))


@cache
def locked_versions() -> dict[str, str]:
    """The pinned versions of constraints.txt, of the packages that it names; empty for an installed wheel."""
    path = _PROJECT / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().lower().replace("_", "-"): version.strip() for name, _, version in pins}


def site_facts(site: Site) -> dict[str, Any]:
    """Where it ran: machine and settings of the site that change speed only. No address, path or
    credential."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "resources": site.resources.model_dump(mode="json"),
        "train": site.train.model_dump(mode="json"),
    }
