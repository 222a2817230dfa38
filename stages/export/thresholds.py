"""thresholds.json of an exported model: what each threshold of the router saves and keeps.

The export stage and `vico export` write it, so that a user can choose another threshold without a run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from stages.controls import ROUTED, points_of

THRESHOLDS_FILE = "thresholds.json"


class ThresholdRow(TypedDict):
    """What a threshold does on test samples, as shares; `is_default` marks the one in config.json."""

    threshold: float
    share_compressed: float
    tokens_saved: float
    quality_kept: float | None
    quality_kept_interval: list[float] | None
    exact_match: float
    is_default: bool


def threshold_rows(evaluation: Mapping[str, Any]) -> list[ThresholdRow]:
    """Return a row for each routed point of the metrics of the evaluate stage, by tokens saved."""
    rows: list[ThresholdRow] = [
        {
            "threshold": point["threshold"],
            "share_compressed": point["share_compressed"],
            "tokens_saved": point["tokens_saved"],
            "quality_kept": point["quality_kept"],
            "quality_kept_interval": point.get("quality_kept_interval"),
            "exact_match": point["exact_match"],
            "is_default": point["threshold"] == evaluation["absolute_threshold"],
        }
        for point in points_of(evaluation, ROUTED)
    ]
    return sorted(rows, key=lambda row: row["tokens_saved"])


def write_thresholds(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Write the table with the number of test samples and the level of its intervals."""
    content = {
        "num_samples": evaluation["num_samples"],
        "interval_level": evaluation["intervals"]["level"],
        "wanted_quality": evaluation.get("wanted_quality"),
        "thresholds": threshold_rows(evaluation),
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    (folder / THRESHOLDS_FILE).write_text(text + "\n", encoding="utf-8")
