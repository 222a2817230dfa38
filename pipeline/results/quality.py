"""What a run measured of its model, by its evaluate stage, and whether that passes the quality gate."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.quality_gate import QualityGate
from pipeline.identity.file_digests import DigestCache
from pipeline.results.run_results import record_of
from pipeline.results.runs import RunFile
from pipeline.storage.lookup import storage_of
from stages.controls import COMPARED, FEWER_TILES, ROUTED, calibrated_points
from stages.outputs import METRICS_FILE

EVALUATED_STAGE, EXPORTED_STAGE = "evaluate", "export"


@dataclass(frozen=True)
class Lead:
    """How much more quality the router keeps than a control at the same tokens, over the curve."""

    difference: float
    interval: tuple[float, float] | None

    @property
    def is_certain(self) -> bool:
        """Whether the whole 95 % interval is above 0."""
        return self.interval is not None and self.interval[0] > 0


@dataclass(frozen=True)
class Quality:
    """The exported model at its calibrated threshold, on the test split.

    Shares are between 0 and 1. `kept` and its interval are None if they are not defined, such as for a start
    model that answers nothing.
    """

    num_questions: int
    tokens_saved: float
    kept: float | None
    kept_interval: tuple[float, float] | None
    auc: float | None
    leads: Mapping[str, Lead]
    """Name of a control, as in `evaluate.controls`, -> the router's lead over it."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def faults(self, gate: QualityGate) -> list[str]:
        """Return why the model does not pass the gate, one clause per reason."""
        faults = []
        if self.num_questions < gate.min_questions:
            faults.append(
                f"measured on {self.num_questions} test questions; quality_gate.min_questions is "
                f"{gate.min_questions}"
            )
        if self.kept is None:
            faults.append("quality not defined: the start model has a similarity of 0")
        elif self.kept < gate.min_kept:
            faults.append(f"keeps {self.kept:.3f} of the quality; quality_gate.min_kept is {gate.min_kept:g}")
        return faults


def gate_of(run: RunFile) -> QualityGate:
    """Return the gate in the config of a run; the defaults for a run of a vico without gates."""
    return QualityGate(**run.config.get("quality_gate", {}))


def run_quality(run: RunFile, storage: Path) -> Quality | None:
    """Return what the run measured; None if it has no finished evaluate stage, or its metrics are gone."""
    entry = run.stages.get(EVALUATED_STAGE)
    if entry is None or entry.state != "done":
        return None
    result = record_of(run, EVALUATED_STAGE, storage)
    if result is None or METRICS_FILE not in result.record.outputs:
        return None
    path = result.output / METRICS_FILE
    if not path.is_file():
        wanted = {METRICS_FILE: result.record.outputs[METRICS_FILE]}
        storage_of(storage).fetch(result.folder, wanted, DigestCache(storage).sha256s)
    return _quality(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=4)
def _quality(path: Path, modified_ns: int) -> Quality | None:
    """Return the quality in metrics.json; None for an evaluation without the calibrated threshold."""
    return quality_of(json.loads(path.read_text(encoding="utf-8")))


def quality_of(metrics: Mapping[str, Any]) -> Quality | None:
    """Return the quality in the metrics of an evaluate stage; None without a point at the threshold."""
    points = calibrated_points(metrics) if metrics.get(ROUTED.name) else []
    if not points:
        return None
    leads = (metrics.get("routed_minus") or {}).get("over_curve") or {}
    controls = [control.name for control in (*COMPARED, FEWER_TILES) if not control.is_bound]
    return Quality(
        num_questions=metrics["num_samples"],
        tokens_saved=points[0]["tokens_saved"],
        kept=points[0]["quality_kept"],
        kept_interval=_ends(points[0].get("quality_kept_interval")),
        auc=metrics["router"]["auc"],
        leads={
            name: Lead(leads[name]["difference"], _ends(leads[name]["interval"]))
            for name in controls
            if name in leads and leads[name]["difference"] is not None
        },
    )


def _ends(interval: Any) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])
