"""`vico diff --curves`: the metrics of two runs that differ, drawn by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.explain.diff import Difference, curves
from pipeline.results.run_results import readable_records
from pipeline.results.runs import Runs
from vico.errors import UserError

MOST_CURVES = 12
_COLUMNS = 3
Curve = Mapping[int, float]
"""Step -> value."""


def draw_curves(storage: Path, differences: Mapping[str, Any], out: Path) -> int:
    """Draw up to MOST_CURVES of the metrics in `run_differences`, those that differ first; return their
    number.

    Raises UserError if no such metric has more than one step, or if `out` cannot be written.
    """
    from matplotlib.figure import Figure

    runs: list[str] = differences["runs"]
    pairs = _curve_pairs(storage, runs, differences["metrics"])[:MOST_CURVES]
    if not pairs:
        raise UserError(f"--curves={out}: no metric of more than one step differs; there is nothing to draw")
    rows = -(-len(pairs) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axis, (title, pair) in zip(axes, pairs, strict=False):
        for run, curve, style in zip(runs, pair, ("-", "--"), strict=True):
            steps = sorted(curve)
            axis.plot(steps, [curve[step] for step in steps], style, label=run)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes[len(pairs) :]:
        axis.remove()
    axes[0].legend(fontsize=7)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise UserError(f"--curves={out} cannot be written ({error.strerror}); name another file") from error
    return len(pairs)


def _curve_pairs(
    storage: Path, runs: Sequence[str], metrics: Sequence[Difference]
) -> list[tuple[str, list[Curve]]]:
    """Return (title, curve of each run) of the metrics with more than one step, those that differ first."""
    records = [readable_records(Runs(storage).named(run), storage) for run in runs]
    pairs = []
    for metric in sorted(metrics, key=lambda metric: metric["step"]):
        stage, name = str(metric["stage"]), metric["name"]
        pair: list[Curve] = [curves(run_records[stage].attempts).get(name, {}) for run_records in records]
        if max(map(len, pair)) > 1:
            pairs.append((f"{stage}: {name}", pair))
    return pairs
