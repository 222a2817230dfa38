"""`vico diff RUN RUN --curves FILE`: the metrics in which two runs differ, drawn over their steps."""

from pathlib import Path
from typing import Any

from pipeline.diff import curves
from pipeline.run_records import readable_records
from pipeline.runs import Runs
from vico.errors import UserError

MOST_CURVES = 12
_COLUMNS = 3


def draw_curves(storage: Path, found: dict[str, Any], out: Path) -> int:
    """Draw up to MOST_CURVES of the metrics that `run_differences` found, those that differ first; how many.

    UserError when none has more than one step, or the place cannot be written.
    """
    from matplotlib.figure import Figure

    records = [readable_records(Runs(storage).named(name), storage) for name in found["runs"]]
    drawn = []
    for one in sorted(found["metrics"], key=lambda one: one["step"]):
        pair = [curves(made[one["stage"]].attempts).get(one["name"], {}) for made in records]
        if max(map(len, pair)) > 1:
            drawn.append((f"{one['stage']}: {one['name']}", pair))
    if not drawn:
        raise UserError(f"--curves={out}: no metric of more than one step differs; there is nothing to draw")
    drawn = drawn[:MOST_CURVES]
    rows = -(-len(drawn) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axis, (title, pair) in zip(axes, drawn, strict=False):
        for name, curve, style in zip(found["runs"], pair, ("-", "--"), strict=True):
            steps = sorted(curve)
            axis.plot(steps, [curve[step] for step in steps], style, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes[len(drawn) :]:
        axis.remove()
    axes[0].legend(fontsize=7)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise UserError(f"--curves={out} cannot be written ({error.strerror}); name another file") from error
    return len(drawn)
