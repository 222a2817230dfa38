"""The source files that a stage's result depends on, found by parsing imports, without importing anything.

Their digests are recorded beside a result; planning compares them, so that it sees an edit under an unchanged
fingerprint.
"""

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from data_prep.records.identity import file_sha256
from pipeline.identity.fingerprints import digest

_METHOD = ("vico", "data_prep", "stages")
"""Packages that decide what is computed; `cluster` and `pipeline` decide where and when."""


def source_digests(module: str) -> dict[str, str]:
    """Return the sha256 of every source file that the module imports, directly or not, by path in the
    project."""
    digests = {_project_path(name, path): _sha256(path) for name, path in _modules(module).items()}
    return dict(sorted(digests.items()))


@cache
def imported_packages(module: str) -> frozenset[str]:
    """Return the installed distributions of which the module's source files import something, as
    `package_versions` names them, and the imported names themselves."""
    names = {
        imported.partition(".")[0]
        for imports in (_imports(module_name, path) for module_name, path in _modules(module).items())
        for imported in imports
    }
    distributions = importlib.metadata.packages_distributions()
    found = {*names, *(distribution for name in names for distribution in distributions.get(name, []))}
    return frozenset(name.lower().replace("_", "-") for name in found)


def _modules(module: str) -> dict[str, Path]:
    """Return the file of every module of the method that the module imports, directly or not."""
    packages = (*_METHOD, module.partition(".")[0])
    modules: dict[str, Path] = {}
    pending, seen = [module], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _source_file(name)
        if path is None:
            continue
        modules[name] = path
        pending += [imported for imported in _imports(name, path) if imported.partition(".")[0] in packages]
    return modules


def sources_digest(digests: dict[str, str]) -> str:
    """Return one digest over the digests of all source files."""
    return digest(digests)


@cache
def _sha256(path: Path) -> str:
    return file_sha256(path)


@cache
def _source_file(module: str) -> Path | None:
    """Return the file of a module; None if the name is a function or class, or a package without a file."""
    spec = _spec(module)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@cache
def _spec(module: str) -> ModuleSpec | None:
    parent = module.rpartition(".")[0]
    above = _spec(parent) if parent else None
    if parent and (above is None or above.submodule_search_locations is None):
        return None
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None


def _project_path(module: str, path: Path) -> str:
    name = module.replace(".", "/")
    return f"{name}/__init__.py" if path.name == "__init__.py" else f"{name}.py"


@cache
def _imports(module: str, path: Path) -> tuple[str, ...]:
    """Return the names that a file imports anywhere, with the packages it is in; some may not be modules."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = [module.rpartition(".")[0]] if "." in module else []
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return tuple(names)


def _statements(module: ast.Module) -> Iterator[ast.AST]:
    """Yield every statement. `ast.walk` also visits expressions, which takes twice as long as parsing."""
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, name, ())
