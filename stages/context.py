"""The context of a stage: its inputs, the folder it writes to, and ways to report.

The runner's context is `pipeline/running/stage_context.py`; a test may give any object of this form.
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

    @property
    def records(self) -> RecordsConfig:
        """The records of the pipeline."""

    @property
    def heldout(self) -> RecordsConfig | None:
        """The held-out records, or None if the pipeline has none."""

    @property
    def repaired(self) -> Repairs | None:
        """The rows that were repaired since the last sharding, or None."""

    def folder(self, name: str) -> Path:
        """Return the folder of an input: a stage's output, `model`, `tokenizer`, or the adopted `folder`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics of a step to the attempt's metrics.jsonl."""

    def progress(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        """Report how far the stage is; cheap enough to call for every part.

        `figures` are shown beside it: `loss`, `learning_rate`, `tokens_per_second` of a training.
        """

    def note(self, text: str) -> None:
        """Show one line to whoever follows the run, and log it."""

    def check(self) -> None:
        """Raise Interrupted or LeaseLost when the stage must stop; call between parts and between steps."""
