"""The shape of the project: which way imports go, the door of each heavy library, what the wheel holds."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# package -> packages (or modules) of ours it may import, beside itself
ARROWS = {
    "vico": set(),
    "data_prep": {"vico"},
    "cluster": {"vico.errors"},  # the one error class that the command line shows without a traceback
    "stages": {"data_prep", "vico", "cluster"},
    "pipeline": {"stages", "data_prep", "vico", "cluster"},
}
# library -> files (or folders) that may import it; the longest matching name decides
DOORS = {
    "ray": ("cluster/",),
    "ray.train": ("stages/train_workers.py",),
    "deepspeed": ("stages/engine.py",),
    "mlflow": ("pipeline/tracking.py", "pipeline/tracking_outputs.py", "pipeline/tracking_audit.py"),
    "webdataset": ("data_prep/tars.py",),
    "fastapi": ("pipeline/serve_app.py",),
    "starlette": ("pipeline/serve_app.py",),
    "uvicorn": ("pipeline/serve.py",),
}
IMPORT_CALLS = {"import_module", "__import__", "find_spec", "LazyLoader"}


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything a module reaches for, at its top or inside a function.

    `from ray import train` gives `ray.train`, and `import_module("ray")` gives `ray`. A use such as
    `ray.get(...)` gives `ray.get`: after `import ray.train` it needs no import of its own.
    """
    doors = {door.partition(".")[0] for door in DOORS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = node.level - is_package  # parts of the module's own name that the dots take off
            start = module.split(".")[:-above] if above > 0 else module.split(".")
            parts = (start if node.level else []) + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in doors:
            yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in IMPORT_CALLS and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, module: str) -> bool:
    """Whether a dotted name is a module or lies in it."""
    return f"{name}.".startswith(f"{module}.")


def violations(root: Path) -> list[str]:
    """One line for each import in the five packages that goes against an arrow or past a door."""
    found = []
    for package in ARROWS:
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            is_package = path.name == "__init__.py"
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            module = module.removesuffix(".__init__")
            for line, name in imported_names(ast.parse(path.read_text()), module, is_package):
                top = name.partition(".")[0]
                allowed = any(within(name, target) for target in (package, *ARROWS[package]))
                if top in ARROWS and not allowed:
                    found.append(f"{file}:{line}: {package} must not import {name}")
                if top in ("tests", "benchmarks", "examples"):
                    found.append(f"{file}:{line}: {name} is not in the wheel")
                door = max((door for door in DOORS if within(name, door)), key=len, default=None)
                if door and not file.startswith(DOORS[door]):
                    found.append(f"{file}:{line}: {name} is imported only in {', '.join(DOORS[door])}")
    return found


def test_imports_follow_the_arrows_and_use_the_doors():
    missing = [package for package in ARROWS if not list((ROOT / package).rglob("*.py"))]
    assert not missing, f"nothing to check in {missing}"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "file, source",
    [
        ("vico/model.py", "def f():\n    from data_prep.index import load_index"),
        ("vico/model.py", "import importlib\nimportlib.import_module('stages.shard')"),
        ("data_prep/tars.py", "from cluster import tasks"),
        ("cluster/site.py", "from vico import errors, tiling"),
        ("cluster/site.py", "if TYPE_CHECKING:\n    import vico.tiling"),
        ("stages/shard.py", "from pipeline.store import Store"),
        ("stages/shard.py", "from ..pipeline import store"),
        ("stages/shard.py", "from tests.unit import samples"),
        ("stages/shard.py", "def run():\n    import ray"),
        ("stages/router.py", "from ray import train"),
        ("cluster/tasks.py", "from ray import train"),
        ("cluster/tasks.py", "import ray\nray.train.get_context()"),
        ("stages/train_workers.py", "import ray.train\nray.get(1)"),
        ("stages/training.py", "import deepspeed.checkpoint as dc"),
        ("pipeline/runner.py", "def f():\n    from mlflow.client import MlflowClient"),
        ("data_prep/reader.py", "import webdataset as wds"),
        ("pipeline/cli_model.py", "def serve():\n    from fastapi import FastAPI"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    "file, source",
    [
        ("stages/train_workers.py", "from ray.train.torch import TorchTrainer"),
        ("stages/train_workers.py", "import ray.train\nray.train.report({})"),
        ("stages/shard.py", "from cluster.tasks import map_tasks"),
        ("stages/shard.py", "from . import context\nfrom .parts import Parts"),
        ("stages/__init__.py", "from . import pipeline"),
        ("cluster/tasks.py", "import ray\nimport ray.util\nray.get(1)"),
        ("cluster/site.py", "from vico.errors import UserError"),
        ("pipeline/tracking.py", "def f():\n    from mlflow import MlflowClient"),
        ("vico/model.py", "import raylib\nfrom vico.tiling import Tiling"),
    ],
)
def test_a_right_import_is_let_through(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


def test_no_dependency_brings_one_of_our_names():
    distributions = importlib.metadata.packages_distributions()
    assert "pytest" in distributions
    others = {name: set(distributions.get(name, [])) - {"vico"} for name in ARROWS}
    assert {name: brought_by for name, brought_by in others.items() if brought_by} == {}


def test_wheel_holds_the_five_packages_and_no_tests(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in (*ARROWS, "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("vico-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (entry_points,) = [n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt")]
        assert "vico = pipeline.cli:main" in archive.read(entry_points).decode()
    assert {name.partition("/")[0] for name in names} == set(ARROWS)
    modules = {p.relative_to(ROOT).as_posix() for package in ARROWS for p in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
