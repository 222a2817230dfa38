"""The step metrics of all attempts at a stage: no step may be missing or be there twice. Called by the
audit."""

import itertools
from collections.abc import Iterable
from pathlib import Path

from cluster.metric_lines import STEP_METRICS_FILE, MetricLine
from pipeline.audit.findings import Findings
from pipeline.results.attempt_metrics import lines_of_attempts
from pipeline.results.stage_folder import StageFolder

CLOCK_SLACK_S = 1.0
"""Clocks are often set back by less than this."""


def audit_metrics(folder: StageFolder, findings: Findings) -> None:
    """Check the steps of all attempts together.

    An attempt resumes from a checkpoint, so it may repeat steps of the attempt before; the first report
    counts.
    """
    lines: list[tuple[Path, MetricLine]] = []
    for whole_line in lines_of_attempts(folder.path / "attempts"):
        if whole_line.path.name != STEP_METRICS_FILE:
            continue
        if whole_line.content is None:
            message = f"the line that ends at byte {whole_line.end} is damaged"
            findings.problem(folder.stage, "metrics", whole_line.path, message)
        else:
            lines.append((whole_line.path, whole_line.content))
    findings.checked["metrics"] += sum(len(line.metrics) for _, line in lines)
    for path, step in _repeated_lines(lines):
        findings.problem(folder.stage, "metrics_overlap", path, f"step {step} is there twice")
    for (earlier_path, earlier), (path, line) in itertools.pairwise(lines):
        back_s = earlier.time_s - line.time_s
        if path == earlier_path and back_s > CLOCK_SLACK_S:
            findings.note(folder.stage, f"the clock jumped back {back_s:.0f} s before step {line.step}")
    _audit_steps({line.step for _, line in lines}, folder, findings)


def _audit_steps(steps: set[int], folder: StageFolder, findings: Findings) -> None:
    path, first, last = folder.path / "attempts", min(steps, default=0), max(steps, default=0)
    missing = [step for step in range(first, last) if step not in steps]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        message = f"{len(missing)} steps are in no attempt's metrics: {shown}"
        findings.problem(folder.stage, "metrics_gap", path, message)
    if first > 1:
        findings.problem(folder.stage, "metrics_gap", path, f"the metrics begin with step {first}")


def _repeated_lines(lines: Iterable[tuple[Path, MetricLine]]) -> list[tuple[Path, int]]:
    """Return (file, step) of lines that are there a second time; a step that was done twice has two times."""
    seen: set[tuple[int, float]] = set()
    repeated = []
    for path, line in lines:
        if (line.step, line.time_s) in seen:
            repeated.append((path, line.step))
        seen.add((line.step, line.time_s))
    return repeated
