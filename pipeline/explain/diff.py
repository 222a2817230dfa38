"""`vico diff RUN RUN`: what differs between two runs in config, inputs, code, packages and results."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.pipeline_file import flattened
from pipeline.results.metric_lines import MetricFiles
from pipeline.results.run_results import RunRecord, readable_records
from pipeline.results.runs import RunFile, Runs
from vico.errors import UserError

KINDS = ("config", "inputs", "code", "packages", "counts", "metrics", "outputs")
_OF_TIME = ("seconds", "system/")
"""Metrics that no two runs share."""
_ALL_LINES = 1 << 30


def run_differences(storage: Path, first: str, second: str) -> dict[str, Any]:
    """{"runs", "same", and for each of KINDS a list of {"stage", "name", "a", "b"}}; `same` looks at what
    was made, the outputs. A metric also has `step`, the first at which the two differ."""
    runs = [Runs(storage).named(name) for name in (first, second)]
    records = [readable_records(run, storage) for run in runs]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    found["config"] = list(_config(*runs))
    for stage in dict.fromkeys(name for one in records for name in one):
        pair = records[0].get(stage), records[1].get(stage)
        if None in pair:
            missing = {"stage": stage, "name": "record", **_sides(*(one and "done" for one in pair))}
            found["outputs"].append(missing)
        else:
            _compare(stage, *pair, found)
    found["code"] += _commits(records)
    undone = [name for run in runs for name in run.stages if not any(name in one for one in records)]
    return {"runs": [run.run for run in runs], "same": not (found["outputs"] or undone), **found}


def _config(first: RunFile, second: RunFile) -> Iterator[dict[str, Any]]:
    before, after = flattened(first.config), flattened(second.config)
    for name, sides in _differing(before, after):
        stage = name.partition(".")[0]
        yield {"stage": stage if stage in {**first.stages, **second.stages} else None, "name": name, **sides}


def _compare(stage: str, first: RunRecord, second: RunRecord, found: dict[str, list[dict[str, Any]]]) -> None:
    a, b = first.record, second.record
    versions = a.identity.get("code_version"), b.identity.get("code_version")
    pairs = {
        "inputs": (a.inputs, b.inputs),
        "code": ({**a.sources, "code_version": versions[0]}, {**b.sources, "code_version": versions[1]}),
        "packages": (a.packages, b.packages),
        "counts": (_lasting(a.counts), _lasting(b.counts)),
        "outputs": (
            {name: file.sha256 for name, file in a.outputs.items()},
            {name: file.sha256 for name, file in b.outputs.items()},
        ),
    }
    for kind, (before, after) in pairs.items():
        found[kind] += [{"stage": stage, "name": name, **sides} for name, sides in _differing(before, after)]
    found["metrics"] += _metrics(stage, curves(first.attempts), curves(second.attempts))


def _commits(records: list[dict[str, RunRecord]]) -> list[dict[str, Any]]:
    """The commits of each run, where they are not the same."""
    sides = []
    for one in records:
        names = {
            str(made.record.git.get("commit"))[:12] + ("+changes" if made.record.git.get("dirty") else "")
            for made in one.values()
        }
        sides.append(", ".join(sorted(names)))
    return [] if sides[0] == sides[1] else [{"stage": None, "name": "commit", **_sides(*sides)}]


def curves(attempts: Path) -> dict[str, dict[int, float]]:
    """metric -> step -> value; of a step done twice, the first."""
    curves: dict[str, dict[int, float]] = {}
    for line in MetricFiles(attempts).unread(_ALL_LINES):
        for name, value in line.metrics.items():
            if not _is_of_time(name):
                curves.setdefault(name, {}).setdefault(line.step, value)
    return curves


def _metrics(
    stage: str, first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]]
) -> Iterator[dict[str, Any]]:
    """The last value of each metric whose curve differs, and the first step where it does."""
    for name in sorted({**first, **second}):
        before, after = first.get(name, {}), second.get(name, {})
        steps = sorted(step for step, _ in _differing(before, after))
        if steps:
            sides = _sides(*(curve[max(curve)] if curve else None for curve in (before, after)))
            yield {"stage": stage, "name": name, **sides, "step": steps[0]}


def _differing(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    for name in sorted({**before, **after}):
        a, b = before.get(name), after.get(name)
        if a != b and not (a != a and b != b):  # nan is what it was
            yield name, _sides(a, b)


def _sides(a: Any, b: Any) -> dict[str, Any]:
    return {"a": a, "b": b}


def _lasting(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in counts.items() if not _is_of_time(name)}


def _is_of_time(name: str) -> bool:
    return name.startswith(_OF_TIME) or "per_second" in name


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
