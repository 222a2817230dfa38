"""What runs first in every worker process: report which code it imports, and do no work if that is not the
driver's.

Ray's workers get these functions by value, and a converter runs this file as a program. So they also run
where `cluster` is missing or is other code, and must import nothing of the project.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import resource
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("vico", "data_prep", "cluster", "stages", "pipeline")
REPORT_PREFIX = "worker-"
_REPORTS: dict[int, dict[str, Any]] = {}
"""Process id -> its report. Each worker has a copy; it stays empty in the driver, where copies are made."""


def code_here() -> dict[str, Any]:
    """Return host, pid, and for each package the folder it is imported from and a digest of its sources.

    A package that is missing, a single file or within an archive has the digest None. `digest` is one over
    all packages; it does not depend on where they are.
    """
    packages = {name: {"folder": _place(name), "digest": _sources_digest(name)} for name in PACKAGES}
    digests = json.dumps([packages[name]["digest"] for name in PACKAGES])
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "digest": hashlib.sha256(digests.encode()).hexdigest(),
        "packages": packages,
    }


def _origin(package: str) -> str | None:
    """Return the file that a top-level package is, or would be, imported from."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec
        return None
    return spec.origin if spec is not None else None


def _place(package: str) -> str | None:
    """Return the folder that a package is in, or the file of a module of this name; None if it is missing."""
    origin = _origin(package)
    if origin is None or os.path.basename(origin) != "__init__.py":
        return origin
    return os.path.dirname(os.path.realpath(os.path.dirname(origin)))


def _sources_digest(package: str) -> str | None:
    """Return a digest over names and bytes of all modules of a package."""
    init_file = Path(_origin(package) or "")
    if init_file.name != "__init__.py" or not init_file.is_file():
        return None
    files = {path.relative_to(init_file.parent): path for path in init_file.parent.rglob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        if all(part.isidentifier() for part in name.with_suffix("").parts):  # not an editor's own files
            digest.update(f"{name.as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def call_task(expected: str, function: bytes, item: bytes) -> tuple[dict[str, Any], Any]:
    """Return this process's report and `function(item)`, both pickled; None instead if the code is not the
    expected."""
    report = _report()
    if report["digest"] != expected:
        return report, None
    return report, pickle.loads(function)(pickle.loads(item))


class Actor:
    """Calls a method of one object. The first call builds it, so that a failure to build it is raised."""

    def __init__(self, expected: str, factory_and_args: bytes) -> None:
        self._expected, self._factory_and_args = expected, factory_and_args
        self._object: object | None = None

    def call(self, method: str, item: bytes) -> tuple[dict[str, Any], Any]:
        """Return this process's report and the method's result, as `call_task` does."""
        report = _report()
        if report["digest"] != self._expected:
            return report, None
        if self._object is None:
            factory, arguments = pickle.loads(self._factory_and_args)
            self._object = factory(*arguments)
        return report, getattr(self._object, method)(pickle.loads(item))


def leave_no_core() -> None:
    """Write no core file if this process, or one that it starts, dies: the environment in it holds
    secrets."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def run_rank(settings: dict[str, Any]) -> None:
    """Leave a report in `folder` and call the pickled (function, argument) of `call`.

    Raises RuntimeError if this is not the `expected` code; the driver reads why in the report.
    """
    leave_report(Path(settings["folder"]), settings["expected"])
    function, argument = pickle.loads(settings["call"])
    function(argument)


def leave_report(folder: Path, expected: str) -> None:
    """Write this process's report into `folder`; raise RuntimeError if this is not the expected code."""
    leave_no_core()
    report = code_here()
    path = folder / f"{REPORT_PREFIX}{report['host']}-{report['pid']}.json"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report))
    os.replace(partial, path)
    if report["digest"] != expected:
        raise RuntimeError(f"other code than the driver's ({report['digest'][:12]}, not {expected[:12]})")


def _report() -> dict[str, Any]:
    """Return this process's report, made once."""
    if os.getpid() not in _REPORTS:
        leave_no_core()
        _REPORTS[os.getpid()] = code_here()
    return _REPORTS[os.getpid()]


def main(arguments: list[str]) -> None:
    """Leave a report, then run a module as a program: FOLDER EXPECTED MODULE ARGUMENT..."""
    folder, expected, module, *rest = arguments
    leave_report(Path(folder), expected)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
