"""The ViCO method: model, losses, labels and routing; independent of pipelines, clusters and their files.

`vico.load(folder)` opens a model for questions about pictures.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # On first use, not at import: opening a model imports torch, and the command line must not wait for it.
    # An import statement would make every stage that imports anything of `vico` depend on that file.
    if name == "load":
        return importlib.import_module("vico.inference.answering_model").load
    if name == "__version__":
        from importlib.metadata import version

        return version("vico")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
