"""One stage of a run in the store: its record, every byte of its output, and the metrics of its attempts.
Called by the audit."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.audit.findings import Findings
from pipeline.identity.provenance import PATCH_FILE, has_commit, locked_versions, package_versions
from pipeline.identity.source_files import sources_digest
from pipeline.results.metric_lines import MetricFiles, MetricLine
from pipeline.results.run_results import record_of
from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import AttemptFile, Record, StageFolder, record_digest
from vico.errors import UserError

METRICS_FILE = "metrics.jsonl"
CLOCK_SLACK_S = 1.0
"""Clocks are set right by less than that all the time."""
_MORE_LINES = 1 << 30


def audit_stage(run: RunFile, stage: str, storage: Path, found: Findings) -> Record | None:
    """Check what lies in the stage's folder; the record if it can be read and is this run's."""
    entry = run.stages[stage]
    folder = StageFolder(storage, stage, entry.fingerprint)
    audit_metrics(folder, found)
    try:
        record = folder.record()
    except UserError as error:
        found.problem(stage, "record", folder.record_path, str(error))
        return None
    if record is None and folder.record_path.exists():
        found.problem(stage, "record", folder.record_path, "is not the one that was committed: it was edited")
        return None
    if record is None:
        if entry.state == "done":
            found.problem(
                stage, "record_missing", folder.record_path, "the run is done here, the record is gone"
            )
        return None
    found.checked["stages"] += 1
    _audit_record(folder, record, found)
    _audit_outputs(folder, record, found)
    _audit_facts(folder, record, found)
    return record if _is_of_run(run, folder, record, found) else None


def _audit_record(folder: StageFolder, record: Record, found: Findings) -> None:
    """The record against its own digests and against the file of the attempt that made it."""
    path, stage = folder.record_path, folder.stage
    content = json.loads(path.read_text(encoding="utf-8"))
    if record.record_digest is None:
        found.note(stage, "the record has no digest of itself (written by an older vico)")
    elif record_digest(content) != record.record_digest:
        found.problem(stage, "record", path, "was edited: record_digest does not fit its content")
    if sources_digest(record.sources) != record.source_digest:
        found.problem(stage, "record", path, "was edited: source_digest does not fit its sources")
    attempt_path = folder.path / "attempts" / str(record.attempt) / "attempt.json"
    try:
        attempt = AttemptFile.read(attempt_path, "the attempt's facts are lost")
    except UserError as error:
        found.problem(stage, "attempt", attempt_path, str(error))
        return
    if attempt is None:
        found.problem(
            stage, "attempt", attempt_path, f"attempt {record.attempt}, which made the record, is gone"
        )
    elif (attempt.inputs, attempt.run) != (record.inputs, record.run):
        found.problem(stage, "attempt", attempt_path, "names other inputs or another run than the record")


def _audit_outputs(folder: StageFolder, record: Record, found: Findings) -> None:
    """Every output re-read in full, and nothing there that is not recorded."""
    storage, sizes = folder.storage, folder.storage.sizes(folder.path)
    damage = folder.damage(record)

    def problem(kind: str, name: str, message: str) -> None:
        found.problem(folder.stage, kind, storage.place(folder.output / name), message)

    for name in damage.missing:
        problem("output_missing", name, "is recorded and not there")
    for name in damage.resized:
        message = f"has {sizes[name]} bytes, {record.outputs[name].bytes} are recorded"
        problem("output_size", name, message)
    names = [name for name in record.outputs if name not in (*damage.missing, *damage.resized)]
    for name, sha256 in zip(names, storage.sha256s(folder.path, names), strict=True):
        found.checked["files"] += 1
        found.checked["bytes"] += record.outputs[name].bytes
        if sha256 != record.outputs[name].sha256:
            message = f"sha256 {sha256[:12]} is not the recorded {record.outputs[name].sha256[:12]}"
            problem("output_content", name, message)
    for name in sorted(set(sizes) - set(record.outputs)):
        problem("output_unrecorded", name, "is there and not recorded")


def _audit_facts(folder: StageFolder, record: Record, found: Findings) -> None:
    """Code and packages: what is gone is a problem, what has moved on since is a note."""
    commit = record.git.get("commit")
    if commit is None:
        found.note(record.stage, "made by code without a commit")
    elif has_commit(commit) is False:
        message = f"commit {commit} is not in this checkout; fetch the branch that has it"
        found.problem(record.stage, "git", commit, message)
    if record.git.get("dirty"):
        _audit_patch(folder, record, found)
    locked = locked_versions()
    used = {name: version.partition("+")[0] for name, version in record.packages.items()}  # without +cpu
    unlike = [name for name in locked if used.get(name, locked[name]) != locked[name]]
    if unlike:
        shown = ", ".join(f"{name} {used[name]}, not {locked[name]}" for name in unlike[:5])
        found.note(record.stage, f"packages differ from constraints.txt: {shown}{_and_more(unlike)}")
    now = package_versions()
    moved = [name for name in record.packages if record.packages[name] != now.get(name)]
    if moved:
        shown = ", ".join(f"{name} {record.packages[name]} -> {now.get(name, 'gone')}" for name in moved[:5])
        found.note(record.stage, f"packages differ from those recorded: {shown}{_and_more(moved)}")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""


def _audit_patch(folder: StageFolder, record: Record, found: Findings) -> None:
    """Code that was not committed can be had again only by the patch that was kept."""
    path = folder.path / "attempts" / str(record.attempt) / PATCH_FILE
    commit, recorded = record.git.get("commit"), record.git.get("patch")
    if recorded is None:
        found.note(record.stage, f"tracked files differed from commit {commit}; sources are kept by digest")
    elif not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != recorded:
        message = f"tracked files differed from commit {commit}, and the patch is gone or was changed"
        found.problem(record.stage, "git", path, message)
    else:
        found.note(record.stage, f"tracked files differed from commit {commit}; {PATCH_FILE} has how")


def _is_of_run(run: RunFile, folder: StageFolder, record: Record, found: Findings) -> bool:
    """Whether the record is the one this run made or reused; said when another run put its own there."""
    entry = run.stages[folder.stage]
    own = record_of(run, folder.stage, folder.path.parent.parent)
    if own is not None and not own.is_superseded:
        return True
    if own is not None and own.record.output_digest == record.output_digest:
        found.note(folder.stage, f"made again by run {record.run}, with the same bytes")
        return True
    if own is not None:
        message = f"run {record.run} made it again with other bytes; this run's result is set aside here"
        found.problem(folder.stage, "superseded", own.path, message)
    elif entry.state == "done":
        message = (
            f"is of run {record.run}, attempt {record.attempt}; run.json says "
            f"{entry.reused_from or run.run}, attempt {entry.attempt}"
        )
        found.problem(folder.stage, "record", folder.record_path, message)
    return False  # not done: killed between record and run.json, which the same command enters


def audit_metrics(folder: StageFolder, found: Findings) -> None:
    """The steps of all attempts together: none left out, none written twice by hand.

    An attempt goes on from a checkpoint, so it may repeat steps of the one before; the first report counts.
    """
    lines = MetricFiles(folder.path / "attempts").unread(_MORE_LINES)
    own = [line for line in lines if line.path.name == METRICS_FILE]
    found.checked["metrics"] += sum(len(line.metrics) for line in own)
    for line in own:
        if not line.metrics and line.time_s == 0.0:
            message = f"the line that ends at byte {line.end} is no metrics"
            found.problem(folder.stage, "metrics", line.path, message)
    good = [line for line in own if line.time_s > 0.0]
    for path, step in _twice(good):
        found.problem(folder.stage, "metrics_overlap", path, f"step {step} stands there twice")
    for earlier, later in itertools.pairwise(good):
        if later.path == earlier.path and later.time_s < earlier.time_s - CLOCK_SLACK_S:
            back_s = earlier.time_s - later.time_s
            found.note(folder.stage, f"the clock jumped back {back_s:.0f} s before step {later.step}")
    steps = {line.step for line in good}
    missing = [step for step in range(min(steps, default=0), max(steps, default=0)) if step not in steps]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        message = f"{len(missing)} steps are in no attempt's metrics: {shown}"
        found.problem(folder.stage, "metrics_gap", folder.path / "attempts", message)
    if min(steps, default=0) > 1:
        message = f"the metrics begin with step {min(steps)}"
        found.problem(folder.stage, "metrics_gap", folder.path / "attempts", message)


def _twice(lines: Iterable[MetricLine]) -> list[tuple[Path, int]]:
    """(file, step) of lines that are there a second time; a step that was done twice has two times."""
    seen: set[tuple[int, float]] = set()
    found = []
    for line in lines:
        if (line.step, line.time_s) in seen:
            found.append((line.path, line.step))
        seen.add((line.step, line.time_s))
    return found
