"""The values that pages may quote from a kept run, and how they are written.

A kept run is a folder of docs/figures: `metrics.json` (of the evaluate stage), `router.json` (metrics.json of
the router stage) and `run.json` (run, commit, command, versions, times).
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.terminal.progress import duration
from stages.controls import COMPARED, ROUTED, calibrated_points, points_of
from stages.evaluate.table import SHOWN_SHARES, evaluation_table

_WANTED = 0.99


class Number(float):
    """A number of a run. A percentage is written `40.0 %`."""

    def __format__(self, spec: str) -> str:
        text = super().__format__(spec)
        return f"{text[:-1]} %" if text.endswith("%") else text


class Interval(tuple):
    """Both ends of an interval, written `0.967 to 1.011`; of a percentage, `62.7 to 82.4 %`."""

    def __format__(self, spec: str) -> str:
        low, high = (format(Number(end), spec) for end in self)
        return f"{low.removesuffix(' %')} to {high}"


def values(folder: Path) -> dict[str, Any]:
    """Return what the text of a page may name in braces, of a kept run.

    `low`, `calibrated` and `high` are the points at a third of the tiles, at the calibrated threshold and at
    two thirds; each has `routed` and the controls. `at_99` is the measured point of the router that saves the
    most tokens among those that keep 0.99 of the quality, the one that keeps the most if none does.
    """
    metrics, router, run = (_json(folder / name) for name in ("metrics.json", "router.json", "run.json"))
    return {
        **{name: _value(value) for name, value in metrics.items()},
        **_points(metrics),
        "at_99": _value(_saving_most(points_of(metrics, ROUTED))),
        "router_stage": _value(router),
        "table": evaluation_table(metrics).partition("\n\n")[0],
        "seconds": SimpleNamespace(**run["seconds"]),
        "time": duration(sum(run["seconds"].values())),
        "run": run["run"],
        "commit": run["commit"][:7],
        "num_records": _value(run["counts"]["shard"]["read"]),
    }


def _points(metrics: dict[str, Any]) -> dict[str, SimpleNamespace]:
    routed = points_of(metrics, ROUTED)
    calibrated = calibrated_points(metrics)[0]
    shares = [point["share_compressed"] for point in routed]
    low, high = (min(range(len(shares)), key=lambda n: abs(shares[n] - share)) for share in SHOWN_SHARES)
    numbers = {"low": low, "calibrated": routed.index(calibrated), "high": high}
    return {
        name: SimpleNamespace(
            **{c.name: _value(points_of(metrics, c)[n]) for c in (ROUTED, *COMPARED) if points_of(metrics, c)}
        )
        for name, n in numbers.items()
    }


def _saving_most(routed: list[dict[str, Any]]) -> dict[str, Any]:
    kept = [point for point in routed if point["quality_kept"] >= _WANTED]
    if not kept:
        return max(routed, key=lambda point: point["quality_kept"])
    return max(kept, key=lambda point: point["tokens_saved"])


def _value(value: Any) -> Any:
    """Return JSON as numbers that write themselves, and objects whose fields are attributes."""
    if isinstance(value, dict):
        return SimpleNamespace(**{name.replace(" ", "_"): _value(part) for name, part in value.items()})
    if isinstance(value, list):
        is_interval = len(value) == 2 and all(isinstance(end, float) for end in value)
        return Interval(value) if is_interval else [_value(part) for part in value]
    return Number(value) if isinstance(value, float) else value


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
