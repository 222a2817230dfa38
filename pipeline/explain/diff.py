"""`vico diff RUN RUN`: what differs between two runs in config, inputs, code, packages and results."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

from pipeline.config.dotted_keys import flattened_text
from pipeline.results.attempt_metrics import first_values
from pipeline.results.records import PACKAGES_OF_ATTEMPTS, Record
from pipeline.results.run_results import RunRecord, readable_records
from pipeline.results.runs import RunFile, Runs

KINDS = ("config", "inputs", "code", "packages", "counts", "metrics", "outputs")
_TIME_METRICS = ("seconds", "system/")
"""How metrics begin that differ between any two runs."""
_Key = TypeVar("_Key", int, str)


class Difference(TypedDict):
    """One value that differs: `a` in the first run, `b` in the second; None if the run does not have it."""

    stage: str | None
    name: str
    a: Any
    b: Any
    step: NotRequired[int]
    """Of a metric: the first step at which the two differ."""


def run_differences(storage: Path, first: str, second: str) -> dict[str, Any]:
    """Return {"runs", "same"} and for each of KINDS a list of Difference.

    `same` is about the outputs alone: both runs made the same files, and all stages of both are done.
    """
    runs = [Runs(storage).named(name) for name in (first, second)]
    records = [readable_records(run, storage) for run in runs]
    differences: dict[str, list[Difference]] = {kind: [] for kind in KINDS}
    differences["config"] = list(_config_differences(*runs))
    for stage in dict.fromkeys(stage for run_records in records for stage in run_records):
        before, after = (run_records.get(stage) for run_records in records)
        if before is None or after is None:
            states = ("done" if record else None for record in (before, after))
            differences["outputs"].append(_difference(stage, "record", *states))
            continue
        for kind, stage_differences in _stage_differences(stage, before, after).items():
            differences[kind] += stage_differences
    differences["code"] += _commit_differences(records)
    undone = [
        stage
        for run in runs
        for stage in run.stages
        if not any(stage in run_records for run_records in records)
    ]
    same = not (differences["outputs"] or undone)
    return {"runs": [run.run for run in runs], "same": same, **differences}


def curves(attempts: Path) -> dict[str, dict[int, float]]:
    """Return metric -> step -> value, without times and system metrics; of a step done twice, the first."""
    return {name: curve for name, curve in first_values(attempts).items() if not _is_of_time(name)}


def _config_differences(first: RunFile, second: RunFile) -> Iterator[Difference]:
    for name, before, after in _differing(flattened_text(first.config), flattened_text(second.config)):
        stage = name.partition(".")[0]
        is_stage = stage in {**first.stages, **second.stages}
        yield _difference(stage if is_stage else None, name, before, after)


def _stage_differences(stage: str, first: RunRecord, second: RunRecord) -> dict[str, list[Difference]]:
    """Return kind -> differences between the records of a stage, and between its metrics."""
    before, after = _compared(first), _compared(second)
    differences = {
        kind: [_difference(stage, *differing) for differing in _differing(before[kind], after[kind])]
        for kind in before
    }
    differences["metrics"] = list(_metric_differences(stage, curves(first.attempts), curves(second.attempts)))
    return differences


def _compared(run_record: RunRecord) -> dict[str, Mapping[str, Any]]:
    """Return kind -> name -> value, as far as a record is compared."""
    record = run_record.record
    return {
        "inputs": record.inputs,
        "code": {**record.sources, "code_version": record.identity.get("code_version")},
        "packages": {**record.packages, **_packages_of_attempts(record)},
        "counts": {name: value for name, value in record.counts.items() if not _is_of_time(name)},
        "outputs": {name: file.sha256 for name, file in record.outputs.items()},
    }


def _packages_of_attempts(record: Record) -> dict[str, str | None]:
    """Return the versions that earlier attempts at a result had and the record has not."""
    attempts = record.facts.get(PACKAGES_OF_ATTEMPTS, {})
    return {
        f"{name} in attempt {attempt}": version
        for attempt, versions in attempts.items()
        for name, version in versions.items()
    }


def _commit_differences(records: Sequence[Mapping[str, RunRecord]]) -> list[Difference]:
    """Return the commits of each run if they are not the same."""
    commits = []
    for run_records in records:
        git_states = [run_record.record.git for run_record in run_records.values()]
        names = {str(git.get("commit"))[:12] + ("+changes" if git.get("dirty") else "") for git in git_states}
        commits.append(", ".join(sorted(names)))
    return [] if commits[0] == commits[1] else [_difference(None, "commit", *commits)]


def _metric_differences(
    stage: str, first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]]
) -> Iterator[Difference]:
    """Yield the last value of each metric whose curve differs, and the first step at which it does."""
    for name in sorted({**first, **second}):
        before, after = first.get(name, {}), second.get(name, {})
        steps = [step for step, _, _ in _differing(before, after)]
        if steps:
            last_values = (curve[max(curve)] if curve else None for curve in (before, after))
            yield {**_difference(stage, name, *last_values), "step": steps[0]}


def _differing(before: Mapping[_Key, Any], after: Mapping[_Key, Any]) -> Iterator[tuple[_Key, Any, Any]]:
    """Yield (name, value before, value after) in order of the names; nan equals nan."""
    for name in sorted({**before, **after}):
        a, b = before.get(name), after.get(name)
        if a != b and not (a != a and b != b):
            yield name, a, b


def _difference(stage: str | None, name: str, a: Any, b: Any) -> Difference:
    return {"stage": stage, "name": name, "a": a, "b": b}


def _is_of_time(name: str) -> bool:
    return name.startswith(_TIME_METRICS) or "per_second" in name
