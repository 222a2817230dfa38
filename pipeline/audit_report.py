"""An audit's findings as JSON for programs and Markdown for people; both go to the run's MLflow page."""

import json

from cluster.site import Site
from pipeline.findings import Findings
from pipeline.runs import RunFile, Runs

FOLDER = "audit"
"""Artifact folder of the reports in the run of the pipeline."""


def report_texts(run: RunFile, found: Findings, moment: str) -> dict[str, str]:
    """File name -> text; `moment` says when the audit was made."""
    content = {"run": run.run, "audited": moment, **found.as_json()}
    return {
        "audit.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "audit.md": _markdown(run, found, moment),
    }


def log_report(site: Site, name: str, found: Findings, moment: str) -> str | None:
    """Put the report into MLflow; the line that says why it is not there, None if it is.

    A run that was never tracked, or whose MLflow does not answer, has none: the audit stands by itself.
    """
    run = Runs(site.storage).named(name)
    unreachable = [one for one in found.problems if one.kind in ("mlflow_unreachable", "mlflow_missing")]
    if not site.tracking.enabled or any(one.stage == "pipeline" for one in unreachable):
        return None
    from pipeline.tracking_audit import log_texts

    texts = report_texts(run, found, moment)
    return log_texts(site, run, {f"{FOLDER}/{file}": text for file, text in texts.items()})


def _markdown(run: RunFile, found: Findings, moment: str) -> str:
    verdict = f"{len(found.problems)} problems" if found.problems else "Everything recorded holds."
    lines = [f"# Audit of run {run.run}", "", f"{moment}: {verdict}", ""]
    if found.problems:
        lines += ["| stage | problem | what | where |", "|---|---|---|---|"]
        lines += [
            f"| {one.stage} | {one.kind} | {_cell(one.message)} | `{_cell(one.path)}` |"
            for one in found.problems
        ]
        lines.append("")
    lines += ["| checked | count |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {count} |" for name, count in found.checked.items()]
    lines += ["", *(f"- {note}" for note in found.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
