"""Model folders in all their layouts: opening, writing, fetching. `load_model` and `open_unread`
are imported from here."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vico.checkpoints.load import load_model as load_model
    from vico.checkpoints.load import open_unread as open_unread


def __getattr__(name: str) -> Any:
    # On first use, not at import: opening a model imports torch, and commands that only plan must not wait
    # for it.
    if name in ("load_model", "open_unread"):
        from vico.checkpoints import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
