"""Imported first by the command line: end it, in one line, if its packages do not come from one folder.

Names such as `pipeline` are common, and a part of one version with a part of another may even run.
"""

import importlib.util
import os
import sys

_PACKAGES = ("vico", "data_prep", "cluster", "stages")
_FOLDER = os.path.dirname(os.path.realpath(os.path.dirname(__file__)))


def misplaced() -> str:
    """Return which of the packages is not beside `pipeline`, and where it is; "" if all are."""
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        folder, file = os.path.split(origin or "")
        if (os.path.realpath(folder), file) != (os.path.join(_FOLDER, name), "__init__.py"):
            return f"{name} comes from {origin or 'nowhere'}"
    return ""


_FAULT = misplaced()
if _FAULT:
    sys.stderr.write(
        f"error: {_FAULT}, and pipeline from {_FOLDER}; all parts of vico must come from one folder: take "
        "the other one off PYTHONPATH, or start vico from its own installation\n"
    )
    sys.exit(2)
