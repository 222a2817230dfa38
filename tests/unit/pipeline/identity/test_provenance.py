"""What is recorded of code and packages: the same whatever was imported, and true if git refuses."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[4]
PRINT_VERSIONS = """import json, sys; from pipeline.identity.provenance import package_versions
print(json.dumps(package_versions()))"""
PRINT_GIT = """import json; from pipeline.identity import provenance
print(json.dumps([provenance.git_state_with_patch(), provenance.git_patch()]))"""
OF_ANOTHER_USER = {
    "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1",  # git's own switch
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}


def last_printed(code: str, root: Path = ROOT, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )
    return process.stdout.splitlines()[-1]


def test_packages_are_the_same_before_and_after_ray_is_imported():
    plain = last_printed(PRINT_VERSIONS)
    assert f'"ray": "{version("ray")}"' in plain and f'"torch": "{version("torch")}"' in plain
    assert last_printed(f"import ray; {PRINT_VERSIONS}") == plain


def test_names_and_versions_are_those_of_the_standard_library(tmp_path):
    """Whatever the metadata look like: fields in a description, Windows line ends, an old format."""
    files = {
        "a.dist-info/METADATA": "Metadata-Version: 2.1\nName: A_b\nVersion: 1.0\n\nName: c\nVersion: 2\n",
        "b.dist-info/METADATA": "Metadata-Version: 2.1\r\nName: b\r\nVersion: 1.1\r\n\r\nVersion: 2\r\n",
        "c.egg-info/PKG-INFO": "Metadata-Version: 1.0\nName: c\nVersion: 1.2\n",
        "d.dist-info/METADATA": "Metadata-Version: 2.1\nName:   d\nVersion:1.3\n",
        "e.dist-info/METADATA": "Metadata-Version: 2.1\nSummary: x\n  Name: y\nName: e\nVersion: 1.4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(text.encode())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {PRINT_VERSIONS}"
    found = json.loads(last_printed(code))
    assert {"a-b": "1.0", "b": "1.1", "c": "1.2", "d": "1.3", "e": "1.4"}.items() <= found.items()
    installed = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in distributions()}
    assert {name: installed[name] for name in found.keys() & installed.keys()}.items() <= found.items()


def test_of_a_package_that_is_on_the_path_twice_the_first_counts(tmp_path):
    info = tmp_path / "ray-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 0.0.1\n")
    assert '"ray": "0.0.1"' in last_printed(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {PRINT_VERSIONS}"
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository with the packages that provenance needs."""
    root = tmp_path_factory.mktemp("checkout") / "vico"
    for package in ("cluster", "pipeline", "stages", "vico"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".gitignore").write_text("__pycache__\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def git_answers(root: Path, **environment: str) -> tuple[dict[str, Any], str | None]:
    """Return `git_state_with_patch` and `git_patch` of a process that runs the code in `root`."""
    state, patch = json.loads(last_printed(PRINT_GIT, root, **environment))
    return state, patch


def test_a_clean_checkout_has_a_commit_and_no_patch(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_answers(checkout) == ({"commit": commit, "dirty": False}, None)


def test_a_git_hook_of_another_repository_changes_nothing(checkout, tmp_path):
    git(tmp_path, "init", "-q")
    environment = {"GIT_DIR": str(tmp_path / ".git"), "GIT_WORK_TREE": str(tmp_path)}
    assert git_answers(checkout, **environment) == git_answers(checkout)


def test_a_checkout_of_another_user_gives_gits_own_line(checkout):
    state, patch = git_answers(checkout, **OF_ANOTHER_USER)
    assert (state["commit"], state["dirty"], patch) == (None, None, None)
    assert "detected dubious ownership in repository at" in state["error"]
    assert state["error"].endswith(f"git config --global --add safe.directory {checkout}")


def test_other_reasons_why_git_says_nothing_are_named(checkout, tmp_path):
    state, _ = git_answers(checkout, PATH=str(tmp_path))
    assert state == {"commit": None, "dirty": None, "error": "git is not installed"}
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    (copy / ".git" / "index").write_bytes(b"damaged")
    assert "index file" in git_answers(copy)[0]["error"]
    shutil.rmtree(copy / ".git")
    (copy / ".git").write_text("gitdir: /nowhere")  # of a worktree whose repository is gone
    assert "not a git repository: /nowhere" in git_answers(copy)[0]["error"]


@pytest.mark.parametrize("case", ["no repository", "in a repository", "in a repository of another user"])
def test_code_that_git_does_not_track_has_no_commit_and_no_error(checkout, tmp_path, case):
    """An installed package is often in a folder within the repository of its user."""
    root = tmp_path / "site-packages"
    shutil.copytree(checkout, root, ignore=shutil.ignore_patterns(".git"))
    if case != "no repository":
        git(tmp_path, "init", "-q")
    environment = OF_ANOTHER_USER if "another user" in case else {}
    assert git_answers(root, **environment) == ({"commit": None, "dirty": None}, None)


def test_a_patch_applies_and_gives_the_same_bytes(checkout, tmp_path):
    """Carriage returns and blank lines at the end of a hunk are part of it."""
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    changed = copy / "vico" / "errors.py"
    content = changed.read_bytes() + b'\r\nTEXT = "\xc3\xa4"  \r\n \n\t\n'
    changed.write_bytes(content)
    state, patch = git_answers(copy)
    assert state["dirty"] and patch is not None and "error" not in state
    git(copy, "checkout", "-q", ".")
    (tmp_path / "sources.patch").write_bytes(patch.encode())
    git(copy, "apply", str(tmp_path / "sources.patch"))
    assert changed.read_bytes() == content


def test_a_patch_that_is_not_utf_8_is_noted(checkout, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    (copy / "vico" / "__init__.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe4\n")
    state, patch = git_answers(copy)
    assert patch is None and state["dirty"] and state["error"] == "what `git diff` printed is not UTF-8 text"
