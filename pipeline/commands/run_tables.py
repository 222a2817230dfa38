"""Runs, their stages and plans as tables that fit 80 columns; ids and paths in a form that can be pasted."""

from collections.abc import Mapping, Sequence

from cluster.site import Site
from pipeline.commands.tables import text_table
from pipeline.planning.estimates import StageEstimate
from pipeline.planning.plan import PlannedStage
from pipeline.results.progress_file import ProgressFile
from pipeline.results.runs import RunFile
from pipeline.results.states import run_state, stage_state
from pipeline.terminal.output import View
from pipeline.terminal.progress import duration, figures_text
from pipeline.terminal.tables import TextTable
from vico.errors import one_line

_FINGERPRINT_CHARS = 12
"""Enough to be the only match of a shell's `*` in a stage's folder."""


def runs_view(runs: Sequence[RunFile]) -> View:
    """Return one row per run, and below them the errors, for `vico status`."""
    rows = []
    for run in runs:
        done = sum(entry.state == "done" for entry in run.stages.values())
        counts = f"{done} of {len(run.stages)} done"
        rows.append((run.run, run_state(run), counts, run.experiment, run.site))
    errors = [f"{run.run}: {one_line(run.error, max_chars=None)}" for run in runs if run.error]
    table = text_table(("run", "state", "stages", "experiment", "site"), rows)
    return [table, *([""] if errors else []), *errors]


def run_view(run: RunFile, site: Site) -> View:
    """Return a line about a run, one row per stage, and lines about progress and origin, for `vico status
    RUN`."""
    rows = [
        (
            name,
            stage_state(run, entry),
            "-" if entry.seconds is None else duration(entry.seconds),
            f"{site.remote or site.storage.name}/{name}/{entry.fingerprint[:_FINGERPRINT_CHARS]}*/output",
        )
        for name, entry in run.stages.items()
    ]
    table = text_table(("stage", "state", "time", "output"), rows)
    return [run_line(run), table, *_progress_lines(run, site), *_origin_lines(run)]


def run_line(run: RunFile) -> str:
    """Return the state of a run, with the reason of its end."""
    error = f" ({one_line(run.error, max_chars=None)})" if run.error else ""
    return f"run {run.run}: {run_state(run)}{error}"


def _progress_lines(run: RunFile, site: Site) -> list[str]:
    """Return how far the running stages are, by the files that their driver writes."""
    lines = []
    for name, entry in run.stages.items():
        if entry.state != "running":
            continue
        folder = site.storage / name / entry.fingerprint
        progress = ProgressFile.of(folder / "attempts" / str(entry.attempt))
        if progress is None:
            continue
        left = progress.seconds_left()
        parts = [
            f"{progress.done}/{progress.total} {progress.unit}",
            figures_text(progress.figures),
            "" if left is None else f"about {duration(left)} left",
        ]
        lines.append(f"{name}: {', '.join(part for part in parts if part)}")
    return lines


def _origin_lines(run: RunFile) -> list[str]:
    """Return which stages came from which other runs."""
    stages: dict[str, list[str]] = {}
    for name, entry in run.stages.items():
        if entry.reused and entry.reused_from and entry.reused_from != run.run:
            stages.setdefault(entry.reused_from, []).append(name)
    return [f"made in run {origin}: {', '.join(names)}" for origin, names in stages.items()]


def plan_table(planned: Sequence[PlannedStage], estimates: Mapping[str, StageEstimate]) -> TextTable:
    """Return one row per stage, for `vico plan`."""
    rows = []
    for stage in planned:
        action = "refused" if stage.refused else stage.action
        expected = estimates[stage.stage].lines() if stage.stage in estimates else []
        reasons = (*stage.reasons, *expected)
        rows.append([stage.stage, action, stage.fingerprint[:_FINGERPRINT_CHARS], reasons])
    return text_table(("stage", "action", "fingerprint", "why"), rows)
