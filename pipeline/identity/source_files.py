"""Which source files a stage's result comes from: its module and all it imports of the method, found without
importing.

Recorded beside a result and compared by planning, so that an edit under an unchanged fingerprint is seen.
"""

import ast
import importlib.util
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from data_prep.records.config import file_sha256
from pipeline.identity.fingerprints import digest

_METHOD = ("vico", "data_prep", "stages")
"""Packages that decide what is computed; `cluster` and `pipeline` decide where and when."""


def source_digests(module: str) -> dict[str, str]:
    """Path below the project -> sha256 of each source file in the import closure of the module."""
    packages = (*_METHOD, module.partition(".")[0])
    found: dict[str, str] = {}
    pending, seen = [module], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _source_file(name)
        if path is None:
            continue
        found[_shown(name, path)] = _sha256(path)
        pending += [other for other in _imports(name, path) if other.partition(".")[0] in packages]
    return dict(sorted(found.items()))


def sources_digest(digests: dict[str, str]) -> str:
    return digest(digests)


@cache
def _sha256(path: Path) -> str:
    return file_sha256(path)


@cache
def _source_file(module: str) -> Path | None:
    """The file of a module, None where the name is a function or class, or a package without a file."""
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


def _shown(module: str, path: Path) -> str:
    name = module.replace(".", "/")
    return f"{name}/__init__.py" if path.name == "__init__.py" else f"{name}.py"


@cache
def _imports(module: str, path: Path) -> tuple[str, ...]:
    """The names a file imports anywhere in it, its own packages included; some may be no modules."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = [module.rpartition(".")[0]] if "." in module else []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            found += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return tuple(found)
