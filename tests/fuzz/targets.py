"""The readers that get hostile files: each with good files to begin with, and what it may raise.

A reader gets a folder and the bytes of a case. `UserError` (one line for the user) and `Rejected` (a row in
quarantine) are answers; anything else is a fault.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from vico.errors import UserError


@dataclass(frozen=True)
class Target:
    """A reader under test. `read(folder, data)` returns nothing that matters; `cases` draws its data."""

    name: str
    cases: st.SearchStrategy[Any]
    read: Callable[[Path, Any], None]
    answers: tuple[type[BaseException], ...] = field(default=(UserError,))


def targets(folder: Path) -> dict[str, Target]:
    """Return all targets by name; `folder` gets the good files (model, shards, pictures)."""
    from tests.fuzz import config_targets, picture_targets, record_targets, shard_targets

    (folder / "images").mkdir(parents=True, exist_ok=True)
    os.environ["VICO_REMOTE_PATIENCE_S"] = "0"
    built = [
        target
        for module in (record_targets, picture_targets, shard_targets, config_targets)
        for target in module.targets(folder)
    ]
    return {target.name: target for target in built}
