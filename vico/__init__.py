"""The ViCO method: model, losses, labels and routing; independent of pipelines, clusters and their files.

`vico.load(folder)` opens a model for questions about pictures.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vico.inference.answering_model import load as load


def __getattr__(name: str) -> Any:
    # On first use, not at import: opening a model imports torch, and the command line must not wait for it.
    if name == "load":
        from vico.inference.answering_model import load

        return load
    if name == "__version__":
        from importlib.metadata import version

        return version("vico")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
