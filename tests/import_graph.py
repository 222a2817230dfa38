"""What each file of the five packages imports, for the tests of the project's structure."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGES = ("vico", "data_prep", "cluster", "stages", "pipeline")
IMPORT_CALLS = {"import_module", "__import__", "find_spec", "LazyLoader"}


def modules(root: Path) -> dict[str, Path]:
    """Map the dotted name of every module in the five packages to its file."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {module_name(path.relative_to(root)): path for path in paths}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path, module: str, used: frozenset[str] = frozenset()) -> Iterator[tuple[int, str]]:
    """Yield (line, full dotted name) of everything a file imports: at its top, inside functions, under
    TYPE_CHECKING, or by a call such as `import_module("ray")`.

    `from ray import train` gives `ray.train`. For the libraries in `used`, a use such as `ray.get(...)` gives
    `ray.get` too: after `import ray.train` it needs no import of its own.
    """
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = node.level - is_package  # parts of the module's own name that the dots take off
            start = module.split(".")[:-above] if above > 0 else module.split(".")
            parts = (start if node.level else []) + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in used:
            yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in IMPORT_CALLS and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def import_graph(root: Path) -> dict[str, set[str]]:
    """Map every module to the modules of the five packages that it imports."""
    known = modules(root)

    def targets(name: str, path: Path) -> set[str]:
        imported = {_module_of(target, known) for _, target in imported_names(path, name)}
        return {target for target in imported if target is not None and target != name}

    return {name: targets(name, path) for name, path in known.items()}


def _module_of(name: str, known: Mapping[str, Path]) -> str | None:
    """Return the module that an imported name is or is defined in."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def circle(graph: Mapping[str, set[str]]) -> str:
    """Return one circle of imports as `a -> b -> a`, or "" if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""
