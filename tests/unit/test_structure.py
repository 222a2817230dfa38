"""The structure of the project: direction of imports, no circles, doors of heavy libraries, the wheel."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.import_graph import circle, import_graph, imported_names, modules

ROOT = Path(__file__).parents[2]

# package -> packages (or modules) of the project that it may import, beside itself
ARROWS = {
    "vico": set(),
    "data_prep": {"vico"},
    # the one error class that the command line shows without a traceback, and files and texts of others
    "cluster": {"vico.errors", "vico.bounded_text", "vico.own_files"},
    "stages": {"data_prep", "vico", "cluster"},
    "pipeline": {"stages", "data_prep", "vico", "cluster"},
}
STAGES = ("shard", "consistency", "ratio", "label", "router", "rates", "evaluate", "export")
# package -> its rooms (files or folders) in rows; each may import only rooms in later rows
ORDERS = {
    "pipeline": (
        ("cli",),
        ("commands",),
        ("explain", "submission", "report"),
        ("audit", "running"),
        ("planning", "tracking"),
        ("results",),
        ("storage",),
        ("identity",),
        ("config", "serving"),
        ("terminal", "json_files", "one_place", "starter"),
    ),
    "stages": (
        STAGES,
        ("training", "inference", "adopted", "figures", "router_files"),
        ("losses_policy", "ratio_scale", "finite"),
        ("context",),
        ("parts", "controls"),
        ("stops", "durable_files", "outputs", "palette", "stage_config"),
    ),
    "data_prep": (
        ("packs",),
        ("shards",),
        ("records",),
        ("demo", "disjoint_sets", "draws", "remote_files"),
        ("environment",),
    ),
}
# library -> files (or folders) that may import it; the longest matching name decides
DOORS = {
    "ray": ("cluster/", "pipeline/serving/replicas/"),
    "ray.serve": ("pipeline/serving/replicas/",),
    "ray.train": ("stages/training/ranks/ray_trainer.py",),
    "deepspeed": (
        "stages/training/engine.py",
        "stages/training/lean_deepspeed.py",
        "stages/training/partitioned.py",
        "stages/training/safe_loading.py",
    ),
    "mlflow": ("pipeline/tracking/", "pipeline/audit/mlflow.py"),
    "kubernetes": ("cluster/launchers/",),
    "prometheus_client": ("pipeline/running/prometheus.py", "pipeline/serving/http/metrics.py"),
    "webdataset": ("data_prep/records/containers/tar_samples.py",),
    "fastapi": ("pipeline/serving/app.py", "pipeline/serving/http/"),
    "starlette": ("pipeline/serving/app.py", "pipeline/serving/http/"),
    "uvicorn": ("pipeline/serving/server.py", "pipeline/serving/http/"),
    "rich": ("pipeline/terminal/",),
    "tensorboardX": ("pipeline/tracking/tensorboard.py",),
    "jinja2": ("pipeline/report/page.py",),
}
LIBRARIES = frozenset(door.partition(".")[0] for door in DOORS)


def within(name: str, module: str) -> bool:
    """Whether a dotted name is a module or lies in it."""
    return f"{name}.".startswith(f"{module}.")


def violations(root: Path) -> list[str]:
    """Return one line per import that goes against an arrow or an order, or past a door."""
    lines = []
    for module, path in modules(root).items():
        package, _, rest = module.partition(".")
        file = path.relative_to(root).as_posix()
        for number, name in imported_names(path, module, LIBRARIES):
            top = name.partition(".")[0]
            where = f"{file}:{number}"
            allowed = any(within(name, target) for target in (package, *ARROWS[package]))
            if top in ARROWS and not allowed:
                lines.append(f"{where}: {package} must not import {name}")
            if top == package and rest and not in_order(package, rest, name):
                lines.append(
                    f"{where}: {package} has the order {shown_order(package)}; {name} goes against it"
                )
            if top in ("tests", "benchmarks", "examples"):
                lines.append(f"{where}: {name} is not in the wheel")
            door = max((door for door in DOORS if within(name, door)), key=len, default=None)
            if door and not file.startswith(DOORS[door]):
                lines.append(f"{where}: {name} is imported only in {', '.join(DOORS[door])}")
    return lines


def in_order(package: str, rest: str, name: str) -> bool:
    """Whether a module may import a name of its own package."""
    if package not in ORDERS:
        return True
    rows = {room: row for row, rooms in enumerate(ORDERS[package]) for room in rooms}
    own, target = rest.partition(".")[0], name.partition(".")[2].partition(".")[0]
    return target == own or target not in rows or rows[own] < rows[target]


def shown_order(package: str) -> str:
    return " > ".join(", ".join(rooms) for rooms in ORDERS[package])


def test_every_file_has_its_place_in_the_order():
    for package, order in ORDERS.items():
        rooms = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert rooms - {"__init__", "__pycache__"} == {room for row in order for room in row}


def test_no_imports_go_in_a_circle():
    assert circle(import_graph(ROOT)) == ""


@pytest.mark.parametrize(
    "planted",
    [
        "from pipeline.storage.lookup import storage_of",
        "def f():\n    from pipeline.storage.lookup import storage_of",
        "if TYPE_CHECKING:\n    from pipeline.storage.lookup import storage_of",
    ],
)
def test_a_circle_is_found_and_printed(tmp_path, planted):
    folder = tmp_path / "pipeline" / "storage"
    folder.mkdir(parents=True)
    (folder / "lookup.py").write_text("from pipeline.storage.object_store import object_storage")
    (folder / "object_store.py").write_text("from pipeline.storage import lease")
    (folder / "lease.py").write_text("import os")
    assert circle(import_graph(tmp_path)) == ""
    (folder / "lease.py").write_text(planted)
    names = [name.rpartition(".")[2] for name in circle(import_graph(tmp_path)).split(" -> ")]
    assert names[0] == names[-1] and set(names) == {"lookup", "object_store", "lease"}
    assert "lease -> lookup" in " -> ".join(names)  # printed in the direction of the import


def test_rooms_are_small_and_say_what_belongs_in_them():
    for package in ARROWS:
        for init in (ROOT / package).rglob("__init__.py"):
            assert init.read_text().startswith('"""'), f"{init} does not say what belongs in its folder"
            files = list(init.parent.glob("*.py"))
            assert len(files) <= 17, f"{init.parent} has {len(files)} files; 16 beside __init__.py at most"
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 5
    long = {
        name: n for name, path in modules(ROOT).items() if (n := len(path.read_text().splitlines())) > 300
    }
    assert long == {}, "a file over 300 lines has a seam"


def test_imports_follow_the_arrows_and_use_the_doors():
    missing = [package for package in ARROWS if not list((ROOT / package).rglob("*.py"))]
    assert not missing, f"nothing to check in {missing}"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "file, source",
    [
        ("vico/model/internvl.py", "def f():\n    from data_prep.shards.index import load_index"),
        ("vico/model/internvl.py", "import importlib\nimportlib.import_module('stages.shard.stage')"),
        ("data_prep/shards/tars.py", "from cluster import tasks"),
        ("cluster/site.py", "from vico import errors, tiling"),
        ("cluster/site.py", "if TYPE_CHECKING:\n    import vico.tiling"),
        ("stages/shard/stage.py", "from pipeline.results.stage_folder import StageFolder"),
        ("stages/shard/stage.py", "from ...pipeline import results"),
        ("stages/shard/stage.py", "from tests.unit import samples"),
        ("stages/shard/stage.py", "def run():\n    import ray"),
        ("stages/router/stage.py", "from ray import train"),
        ("stages/router/stage.py", "from stages.ratio.config import RatioConfig"),
        ("stages/parts.py", "def f():\n    from stages.context import Context"),
        ("data_prep/records/blocks.py", "from data_prep import shards"),
        ("pipeline/identity/fingerprints.py", "from pipeline.storage.folder import FolderStorage"),
        ("pipeline/audit/run.py", "from pipeline.running.driver import Driver"),
        ("pipeline/planning/plan.py", "if TYPE_CHECKING:\n    from pipeline.tracking.sync import sync"),
        ("cluster/tasks.py", "from ray import train"),
        ("cluster/tasks.py", "import ray\nray.train.get_context()"),
        ("stages/training/ranks/ray_trainer.py", "import ray.train\nray.get(1)"),
        ("stages/training/loop.py", "import deepspeed.checkpoint as dc"),
        ("pipeline/running/runner.py", "def f():\n    from mlflow.client import MlflowClient"),
        ("data_prep/shards/reader.py", "import webdataset as wds"),
        ("pipeline/commands/model.py", "def serve():\n    from fastapi import FastAPI"),
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
        ("stages/training/ranks/ray_trainer.py", "from ray.train.torch import TorchTrainer"),
        ("stages/training/ranks/ray_trainer.py", "import ray.train\nray.train.report({})"),
        ("stages/shard/stage.py", "from cluster.tasks import map_tasks"),
        ("stages/shard/stage.py", "from .. import context\nfrom ..parts import Parts"),
        (
            "pipeline/cli.py",
            "from pipeline.commands import runs\nfrom pipeline.terminal.progress import Display",
        ),
        ("pipeline/storage/lease.py", "from pipeline.storage.lease_file import read_lease"),
        ("stages/__init__.py", "from . import pipeline"),
        ("cluster/tasks.py", "import ray\nimport ray.util\nray.get(1)"),
        ("cluster/site.py", "from vico.errors import UserError"),
        ("pipeline/tracking/sync.py", "def f():\n    from mlflow import MlflowClient"),
        ("vico/model/internvl.py", "import raylib\nfrom vico.tiling import Tiling"),
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
    for file in ("pyproject.toml", "README.md", "LICENSE", "vico_command.py"):
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
        assert "vico = vico_command:main" in archive.read(entry_points).decode()
    assert {name.partition("/")[0] for name in names} == {*ARROWS, "vico_command.py"}
    modules = {p.relative_to(ROOT).as_posix() for package in ARROWS for p in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {*modules, "vico_command.py"}
    templates = {f"pipeline/report/templates/{name}" for name in ("page.html", "macros.html", "style.css")}
    assert templates <= set(names), "`vico report` works without a checkout"
    starter = {
        name.removeprefix("pipeline/starter/") for name in names if name.startswith("pipeline/starter/")
    }
    listed = subprocess.run(
        ["git", "ls-files", "models", "configs", "sites", "constraints.txt"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert starter == set(listed.stdout.split())


OWN_LIMITS = {
    "tests/drill.py": "a program of its own",
    "tests/integration/test_serve_exposed.py": "before the server cuts the clients off",
    "tests/unit/test_device_script.py": "the limit of a part is what is tested",
    "tests/waiting.py": "the one limit",
}


def test_waits_of_tests_have_one_limit():
    """A limit that holds on one machine fails on a slower one. That of `tests/waiting.py` ends only hangs."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            deadline = isinstance(node, ast.BinOp) and ast.unparse(node.left) == "time.monotonic()"
            if (deadline and isinstance(node.op, ast.Add)) or is_own_timeout(node):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == OWN_LIMITS.keys()


LIMIT_POSITIONS = {
    **dict.fromkeys(("wait", "join", "result", "exception", "timeout", "settimeout"), 0),
    **dict.fromkeys(("create_connection", "communicate"), 1),
}
"""Where calls that wait take a limit by position."""


def is_own_timeout(node: ast.AST) -> bool:
    """Return whether it limits a wait to 10 seconds or more; a test expects shorter limits to run out."""
    limits: list[ast.expr] = []
    if isinstance(node, ast.keyword) and node.arg in ("timeout", "wait_s"):
        limits = [node.value]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        position = LIMIT_POSITIONS.get(node.func.attr)
        limits = [] if position is None else node.args[position : position + 1]
    numbers = [limit.value for limit in limits if isinstance(limit, ast.Constant)]
    return any(isinstance(number, int | float) and number >= 10 for number in numbers)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("process.wait(timeout=60)", True),
        ("process.wait(60)", True),
        ("future.result(60)", True),
        ("asyncio.timeout(20)", True),
        ("connection.settimeout(60)", True),
        ("socket.create_connection(address, 60)", True),
        ("process.communicate(None, 60)", True),
        ("LEASES.acquire(wait_s=20)", True),
        ("fetch.result(timeout=0.5)", False),
        ("thread.join(PATIENCE_S)", False),
        ("', '.join(names)", False),
    ],
)
def test_an_own_limit_is_found(source, expected):
    assert any(map(is_own_timeout, ast.walk(ast.parse(source)))) == expected


def test_the_order_in_the_documentation_is_the_one_that_is_checked():
    page = (ROOT / "docs" / "architecture.md").read_text()
    order = "".join(line for line in page.splitlines(keepends=True) if line.startswith("    "))
    shown = {package: shown_order(package) for package in ORDERS}
    shown["stages"] = shown["stages"].replace(", ".join(STAGES), "the eight stages")
    assert " ".join(order.split()).endswith(" ".join(f"{package}: {text}" for package, text in shown.items()))
