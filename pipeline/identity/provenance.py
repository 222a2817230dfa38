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

from cluster.passwords import without_passwords
from cluster.project import PROJECT_FOLDER, STARTER_FOLDER
from cluster.site import Site
from vico.errors import one_line

_RAYS_OWN = os.path.join("ray", "thirdparty_files")
PACKAGED_GIT_FILE, PACKAGED_PATCH_FILE = "submitted/git.json", "submitted/git.patch"
"""In the package of a submitted job: `git_state` and `git_patch` of the machine that packed it."""
PATCH_FILE = "sources.patch"
"""In an attempt's folder if tracked files differed from the commit: `git_patch`."""
_GIT_TIMEOUT_S = 20
_GIT_MESSAGE_CHARS = 1000
_OF_ANOTHER_REPOSITORY = frozenset(
    {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}
)
_UNTRACKED = "did not match any file"
_INSTALLED = ("site-packages", "dist-packages")


class _GitFailed(Exception):
    """Git could not answer. The message is its own, or why it could not be asked."""


@cache
def git_state() -> dict[str, Any]:
    """Return `commit` of the checkout that this code runs from or was packed from, and `dirty`: whether
    tracked files differ from it.

    Both are None for an installed wheel. If git does not answer, `error` is what it says: it refuses, for
    example, the checkout of another user.
    """
    packaged = PROJECT_FOLDER / PACKAGED_GIT_FILE
    if packaged.is_file():
        return json.loads(packaged.read_text(encoding="utf-8"))
    state: dict[str, Any] = {"commit": None, "dirty": None}
    try:
        if _is_checkout():
            state["commit"] = _git("rev-parse", "HEAD").strip()
            state["dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no").strip())
    except _GitFailed as failed:
        state["error"] = str(failed)
    return state


@cache
def git_patch() -> str | None:
    """Return how tracked files differ from the commit, as input of `git apply`; None if they do not, or if
    git does not say."""
    return _patch_and_error()[0]


@cache
def _patch_and_error() -> tuple[str | None, str | None]:
    packaged = PROJECT_FOLDER / PACKAGED_PATCH_FILE
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8"), None
    if not git_state()["dirty"]:
        return None, None
    try:
        return _git("diff", "--binary", "HEAD"), None
    except _GitFailed as failed:
        return None, str(failed)


def git_state_with_patch() -> dict[str, Any]:
    """Return `git_state`, with the sha256 of `git_patch` as `patch` if tracked files differ from the
    commit."""
    patch, error = _patch_and_error()
    state = git_state() if error is None else {**git_state(), "error": error}
    return state if patch is None else {**state, "patch": sha256(patch.encode()).hexdigest()}


def has_commit(commit: str) -> bool | None:
    """Return whether the checkout that this code runs from has the commit; None without a checkout, or if git
    does not say."""
    try:
        _git("rev-parse", "--git-dir")
    except _GitFailed:
        return None
    try:
        _git("cat-file", "-e", f"{commit}^{{commit}}")
    except _GitFailed:
        return False
    return True


def _is_checkout() -> bool:
    """Return whether git tracks this code: not if it was installed, also into a folder within a checkout of
    something else. Raises _GitFailed if git does not say."""
    if not any((folder / ".git").exists() for folder in (PROJECT_FOLDER, *PROJECT_FOLDER.parents)):
        return False
    try:
        _git("ls-files", "--error-unmatch", os.path.relpath(__file__, PROJECT_FOLDER))
    except _GitFailed as failed:
        if _UNTRACKED in str(failed) or PROJECT_FOLDER.name in _INSTALLED:
            return False
        raise
    return True


def _git(*arguments: str) -> str:
    """Return what a git command prints, as it is. Raises _GitFailed."""
    command = ["git", "-C", str(PROJECT_FOLDER), *arguments]
    # A hook of git runs with variables that name its own repository.
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY}
    environment["LC_ALL"] = "C"
    try:
        process = subprocess.run(
            command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=False, env=environment
        )
    except FileNotFoundError as error:
        raise _GitFailed("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        message = f"`git {arguments[0]}` did not end within {_GIT_TIMEOUT_S} s"
        raise _GitFailed(message) from error
    except OSError as error:
        raise _GitFailed(one_line(error)) from error
    if process.returncode:
        errors = without_passwords(process.stderr.decode("utf-8", "replace"))
        message = one_line(errors, max_chars=_GIT_MESSAGE_CHARS)
        raise _GitFailed(message or f"`git {arguments[0]}` ended with code {process.returncode}")
    try:
        return process.stdout.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _GitFailed(f"what `git {arguments[0]}` printed is not UTF-8 text") from error


@cache
def package_versions() -> dict[str, str]:
    """Return the version of every installed distribution; of one that is on the path twice, the first.

    Distributions inside Ray's own folder are left out: importing Ray puts them on the path, and the same
    environment would look different before and after.
    """
    path = [folder for folder in sys.path if not folder.endswith(_RAYS_OWN)]
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=path):
        name, version = _name_and_version(distribution)
        if name:
            versions.setdefault(name.lower().replace("_", "-"), version)
    return dict(sorted(versions.items()))


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """Return the two without `metadata`, which parses the whole file for each, descriptions included."""
    head = (distribution.read_text("METADATA") or "").partition("\n\n")[0]
    fields = dict(
        line.split(": ", 1) for line in head.splitlines() if line.startswith(("Name: ", "Version: "))
    )
    if len(fields) == 2:
        return fields["Name"].strip(), fields["Version"].strip()
    return distribution.metadata["Name"], distribution.version


@cache
def locked_versions() -> dict[str, str]:
    """Return the versions that constraints.txt pins, by package."""
    path = STARTER_FOLDER / "constraints.txt"
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
