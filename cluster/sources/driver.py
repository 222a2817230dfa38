"""The code of this process: one place and one digest, which every worker's code is compared with."""

from __future__ import annotations

import os
import site
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from cluster.project import PROJECT_FOLDER
from cluster.sources.in_worker import PACKAGES, code_here
from vico.errors import UserError


@cache
def driver_code() -> dict[str, Any]:
    """Return `code_here` of this process as it was at the first call, which is before any work.

    Raises UserError if the packages do not come from one place.
    """
    code = code_here()
    for name in PACKAGES:
        package = code["packages"][name]
        if package["digest"] is None or package["folder"] != str(PROJECT_FOLDER):
            raise UserError(
                f"the package {name} comes from {package['folder'] or 'nowhere'}, and cluster from "
                f"{PROJECT_FOLDER}; all of {', '.join(PACKAGES)} must come from one folder: take the other "
                "one off PYTHONPATH, or start vico from its own installation"
            )
    return code


def python_path() -> str:
    """Return PYTHONPATH for a process on this machine that imports what this one does: the project first,
    and never the working directory for being the working directory."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kept = [
        os.path.abspath(entry)
        for entry in entries
        if os.path.isabs(entry) or os.path.abspath(entry) != os.getcwd()
    ]
    return os.pathsep.join([*([] if is_installed() else [str(PROJECT_FOLDER)]), *kept])


def is_installed() -> bool:
    """Return whether the project was installed as a wheel rather than run from a checkout."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return PROJECT_FOLDER in [Path(folder).resolve() for folder in (*folders, site.getusersitepackages())]
