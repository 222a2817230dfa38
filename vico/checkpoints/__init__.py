"""Model folders: every layout that is opened or written, and `load_model`, the way to open one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vico.checkpoints.load import load_model as load_model


def __getattr__(name: str) -> Any:
    # On first use, not here: opening a model imports torch, which commands that only plan must not wait for.
    if name == "load_model":
        from vico.checkpoints.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
