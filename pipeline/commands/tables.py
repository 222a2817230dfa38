"""Output of the commands that read: runs, stages, plans and findings as JSON objects and as tables."""

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.site import Site
from cluster.site_checks.report import CheckResult
from pipeline.audit.findings import Findings
from pipeline.results.garbage import Garbage
from pipeline.results.runs import PIPELINE, RunFile
from pipeline.terminal.tables import Cell, TextTable
from pipeline.tracking.sent import SentState


def text_table(
    names: Iterable[object], rows: Iterable[Iterable[Cell]], title: str | None = None
) -> TextTable:
    """Return a table of the rows."""
    return TextTable(tuple(names), tuple(map(tuple, rows)), title)


def run_summary(run: RunFile) -> dict[str, Any]:
    """Return a run as `vico status --json` lists it."""
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
    """Return a run as `vico status RUN --json` prints it.

    With an object store, `path` is in the working copy and may not exist yet.
    """
    storage = site.storage
    sent = SentState.of(storage / "runs" / run.run, site).runs  # run.json lacks ids that came after the end
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
            "mlflow_run_id": entry.mlflow_run_id or (sent[name].id if name in sent else None),
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
        "mlflow_run_id": run.mlflow_run_id or (sent[PIPELINE].id if PIPELINE in sent else None),
        "submission": run.submission,
        "attempts": [attempt.model_dump(mode="json") for attempt in run.attempts],
        "error": run.error,
    }


def findings_table(findings: Findings) -> TextTable:
    """Return one row per problem, for `vico audit`."""
    rows = ((problem.stage, problem.kind, problem.message, problem.path) for problem in findings.problems)
    return text_table(("stage", "problem", "what", "where"), rows)


def checks_table(results: Iterable[CheckResult]) -> TextTable:
    """Return one row per check of a site, for `vico site check`."""
    rows = [
        (result.check, result.state, f"{result.detail}; {result.remedy}" if result.remedy else result.detail)
        for result in results
    ]
    return text_table(("check", "state", "what"), rows)


def differences_table(differences: Mapping[str, Any]) -> TextTable:
    """Return one row per difference between two runs, for `vico diff`; digests are shortened."""
    rows = []
    for kind, differing in differences.items():
        for row in differing if kind not in ("runs", "same") else ():
            name = f"{row['name']} (from step {row['step']})" if "step" in row else row["name"]
            sides = ["-" if row[side] is None else _shortened(str(row[side])) for side in ("a", "b")]
            rows.append((kind, row["stage"] or "-", name, *sides))
    return text_table(("what", "stage", "name", *differences["runs"]), rows)


def sample_tables(sample: Mapping[str, Any]) -> list[TextTable]:
    """Return the uses of a sample in training, and its rows in the stages' tables, for `audit --sample`."""
    title = f"{sample['key']}: split {sample['split']}, shard {sample['shard']}, tiles {sample['tiles']}"
    tables = [_rows_table(sample["uses"], f"{title}; used {len(sample['uses'])} times")]
    return tables + [_rows_table(rows, name) for name, rows in sample.items() if _is_rows(name, rows)]


def step_tables(samples: Mapping[str, Any]) -> list[TextTable]:
    """Return the samples of a step in each training, for `audit --step`."""
    step = samples["step"]
    return [_rows_table(rows, f"{stage}, step {step}") for stage, rows in samples["stages"].items()]


def _is_rows(name: str, value: Any) -> bool:
    return name != "uses" and isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _rows_table(rows: list[dict[str, Any]], title: str) -> TextTable:
    return text_table(rows[0] if rows else (), (map(_value_shown, row.values()) for row in rows), title)


def _value_shown(value: Any) -> str:
    """Return a value as text; the rates of a sample's tiles as letters: f full, c compressed."""
    if isinstance(value, list):
        return "".join("c" if compressed else "f" for compressed in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def garbage_table(garbage: list[Garbage], dry_run: bool) -> TextTable:
    """Return one row per file or folder that no run needs, for `vico gc`."""
    mib = sum(piece.bytes for piece in garbage) / (1 << 20)
    title = f"{'would free' if dry_run else 'freed'} {mib:.1f} MiB in {len(garbage)} places"
    rows = ((piece.kind, f"{piece.bytes / (1 << 20):.1f}", piece.why, piece.path) for piece in garbage)
    return text_table(("what", "MiB", "why", "where"), rows, title)


def _shortened(text: str) -> str:
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_digest else text
