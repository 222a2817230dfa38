"""What reading commands show: runs, stages and plans as JSON objects and as tables."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.site import Site
from pipeline.audit.findings import Findings
from pipeline.planning.estimates import Expected
from pipeline.planning.plan import PlannedStage
from pipeline.progress import duration
from pipeline.results.garbage import Garbage
from pipeline.results.runs import RunFile

_PLAIN_WIDTH = 240
"""Columns where output is not a terminal, so that no line of a table breaks."""


def console() -> Console:
    """Standard output for tables; colour and width of the terminal, plain and wide elsewhere."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def run_summary(run: RunFile) -> dict[str, Any]:
    """A run in the list of `vico status --json`."""
    return {
        "run": run.run,
        "state": run.state,
        "created": run.created,
        "experiment": run.experiment,
        "site": run.site,
        "stages": {name: entry.state for name, entry in run.stages.items()},
        "error": run.error,
    }


def run_details(run: RunFile, site: Site) -> dict[str, Any]:
    """`vico status RUN --json`. Of an object store, `path` is in the working copy, not always there yet."""
    storage = site.storage
    stages = [
        {
            "name": name,
            "state": entry.state,
            "fingerprint": entry.fingerprint,
            "attempt": entry.attempt,
            "seconds": entry.seconds,
            "reused": entry.reused,
            "reused_from": entry.reused_from,
            "path": str(storage / name / entry.fingerprint / "output"),
            "mlflow_run_id": entry.mlflow_run_id,
        }
        for name, entry in run.stages.items()
    ]
    return {
        "run": run.run,
        "state": run.state,
        "stages": stages,
        "created": run.created,
        "experiment": run.experiment,
        "site": run.site,
        "storage": site.storage_address,
        "mlflow_run_id": run.mlflow_run_id,
        "submission": run.submission,
        "attempts": [attempt.model_dump(mode="json") for attempt in run.attempts],
        "error": run.error,
    }


def runs_table(runs: list[RunFile]) -> Table:
    table = Table("run", "state", "experiment", "stages", "site", "error", box=None, pad_edge=False)
    for run in runs:
        done = sum(entry.state == "done" for entry in run.stages.values())
        counts = f"{done}/{len(run.stages)} done"
        table.add_row(run.run, run.state, run.experiment, counts, run.site, run.error or "")
    return table


def stages_table(run: RunFile, site: Site) -> Table:
    table = Table("stage", "state", "attempt", "time", "from", "output", box=None, pad_edge=False)
    for name, entry in run.stages.items():
        table.add_row(
            name,
            "reused" if entry.reused else entry.state,
            str(entry.attempt or "-"),
            "-" if entry.seconds is None else duration(entry.seconds),
            entry.reused_from or "-",
            f"{site.remote or site.storage.name}/{name}/{entry.fingerprint[:12]}…/output",
        )
    return table


def plan_table(planned: list[PlannedStage], expected: Mapping[str, Expected]) -> Table:
    columns = ["stage", "action", "fingerprint", "why", *(["takes about"] if expected else [])]
    table = Table(*columns, box=None, pad_edge=False)
    for one in planned:
        action = "refused" if one.refused else one.action
        row = [one.stage, action, one.fingerprint[:12], "\n".join(one.reasons)]
        table.add_row(*row, *([str(expected.get(one.stage, ""))] if expected else []))
    return table


def findings_table(found: Findings) -> Table:
    table = Table("stage", "problem", "what", "where", box=None, pad_edge=False)
    for one in found.problems:
        table.add_row(one.stage, one.kind, escape(one.message), escape(one.path))
    return table


def differences_table(found: dict[str, Any]) -> Table:
    """`vico diff`: digests shortened, which are told apart by their beginnings."""
    table = Table("what", "stage", "name", *found["runs"], box=None, pad_edge=False)
    for kind, rows in found.items():
        for row in rows if kind not in ("runs", "same") else ():
            name = f"{row['name']} (from step {row['step']})" if "step" in row else row["name"]
            sides = ["-" if row[side] is None else _shortened(str(row[side])) for side in ("a", "b")]
            table.add_row(kind, row["stage"] or "-", *map(escape, (name, *sides)))
    return table


def sample_tables(found: dict[str, Any]) -> list[Table]:
    """`vico audit --sample`: its uses in training, then its rows in the stages' tables."""
    title = f"{found['key']}: split {found['split']}, shard {found['shard']}, tiles {found['tiles']}"
    tables = [_rows_table(found["uses"], f"{title}; used {len(found['uses'])} times")]
    return tables + [_rows_table(rows, name) for name, rows in found.items() if _is_rows(name, rows)]


def step_tables(found: dict[str, Any]) -> list[Table]:
    """`vico audit --step`: the samples of the step in each training."""
    step = found["step"]
    return [_rows_table(rows, f"{stage}, step {step}") for stage, rows in found["stages"].items()]


def _is_rows(name: str, value: Any) -> bool:
    return name != "uses" and isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _rows_table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(*(rows[0] if rows else ()), box=None, pad_edge=False, title=escape(title))
    table.title_justify = "left"
    for row in rows:
        table.add_row(*(_value_shown(value) for value in row.values()))
    return table


def _value_shown(value: Any) -> str:
    """Rates of tiles as letters: f full, c compressed."""
    if isinstance(value, list):
        return "".join("c" if one else "f" for one in value)
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def garbage_table(found: list[Garbage], dry_run: bool) -> Table:
    mib = sum(one.bytes for one in found) / (1 << 20)
    title = f"{'would free' if dry_run else 'freed'} {mib:.1f} MiB in {len(found)} places"
    table = Table("what", "MiB", "why", "where", box=None, pad_edge=False, title=title, title_justify="left")
    for one in found:
        table.add_row(one.kind, f"{one.bytes / (1 << 20):.1f}", escape(one.why), escape(str(one.path)))
    return table


def _shortened(text: str) -> str:
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_digest else text[:60]
