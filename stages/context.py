"""What a stage gets from whoever runs it: its inputs, its place to write, and ways to report.

The runner of the pipeline gives the real one; a test may give any object of this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cluster.site import Site
    from data_prep.records.config import RecordsConfig
    from data_prep.records.repairs import Repairs
    from stages.parts import Parts


class Context(Protocol):
    """One attempt at one stage, as the stage sees it."""

    stage: str
    parts: Parts
    site: Site
    inputs: Mapping[str, Path | RecordsConfig | Repairs | None]
    """A stage's name -> its output folder; model and tokenizer -> the model folder; records and heldout ->
    their config, repaired -> the files it is about (None where the pipeline has none)."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append metrics of a step to the attempt's metrics.jsonl."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say how far the stage is; cheap enough to call for every part."""

    def note(self, text: str) -> None:
        """Say one line to whoever follows the run; it also goes to the log."""

    def check(self) -> None:
        """Raise Interrupted or LeaseLost when the stage must stop; call between parts and between steps."""
