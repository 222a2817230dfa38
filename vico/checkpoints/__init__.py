"""Model folders in all their layouts: opening, writing, fetching. `load_model` is imported from here."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vico.checkpoints.load import load_model as load_model


def __getattr__(name: str) -> Any:
    # On first use, not at import: opening a model imports torch, and commands that only plan must not wait
    # for it.
    if name == "load_model":
        from vico.checkpoints.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
