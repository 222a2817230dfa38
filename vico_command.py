"""The installed command `vico`: ends in one line if `pipeline` does not come from the folder of this file.

The name `pipeline` is common: a module or package of another project with this name may come first on
PYTHONPATH. `pipeline/one_place.py` then checks the other packages.
"""

import importlib.util
import os
import sys

_FOLDER = os.path.dirname(os.path.realpath(__file__))


def main() -> None:
    """Run the command line."""
    spec = importlib.util.find_spec("pipeline")
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    place = next(filter(None, places), "nowhere")
    folder, file = os.path.split(place)
    if (os.path.realpath(folder), file) != (os.path.join(_FOLDER, "pipeline"), "__init__.py"):
        sys.stderr.write(
            f"error: pipeline comes from {place}, and vico_command from {_FOLDER}; all parts of vico must "
            "come from one folder: take the other one off PYTHONPATH, or start vico from its own "
            "installation\n"
        )
        sys.exit(2)
    from pipeline.cli import main as run_command_line

    run_command_line()
