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
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        place = next(filter(None, places), "nowhere")  # a folder without __init__.py has no origin
        folder, file = os.path.split(place)
        if (os.path.realpath(folder), file) != (os.path.join(_FOLDER, name), "__init__.py"):
            return f"{name} comes from {place}"
    return ""


_FAULT = misplaced()
if _FAULT:
    sys.stderr.write(
        f"error: {_FAULT}, and pipeline from {_FOLDER}; all parts of vico must come from one folder: take "
        "the other one off PYTHONPATH, or start vico from its own installation\n"
    )
    sys.exit(2)
