"""The report of an audit as JSON and Markdown, stored as artifacts of the pipeline's MLflow run."""

import json

from cluster.site import Site
from pipeline.audit.findings import Findings
from pipeline.results.runs import RunFile, Runs
from vico.shown_text import markdown, markdown_code

FOLDER = "audit"
"""Artifact folder of the reports."""


def log_report(site: Site, name: str, findings: Findings, moment: str) -> str | None:
    """Store the report of a run in MLflow; return the line that says why it is not there, or None if it is.

    `moment` is the time of the audit. Returns None too if the run was never tracked, or if MLflow does not
    answer: then the findings say so.
    """
    run = Runs(site.storage).named(name)
    is_unreachable = any(
        problem.stage == "pipeline" and problem.kind in ("mlflow_unreachable", "mlflow_missing")
        for problem in findings.problems
    )
    if not site.tracking.enabled or is_unreachable:
        return None
    from pipeline.tracking.outputs import log_texts

    texts = report_texts(run, findings, moment)
    return log_texts(site, run, {f"{FOLDER}/{file}": text for file, text in texts.items()})


def report_texts(run: RunFile, findings: Findings, moment: str) -> dict[str, str]:
    """Return file name -> text."""
    content = {"run": run.run, "audited": moment, **findings.as_json()}
    return {
        "audit.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "audit.md": _markdown(run, findings, moment),
    }


def _markdown(run: RunFile, findings: Findings, moment: str) -> str:
    problems = findings.problems
    verdict = f"{len(problems)} problems" if problems else "Everything recorded holds."
    lines = [f"# Audit of run {markdown(run.run)}", "", f"{moment}: {verdict}", ""]
    if problems:
        lines += ["| stage | problem | what | where |", "|---|---|---|---|"]
        lines += [
            f"| {markdown(problem.stage)} | {markdown(problem.kind)} | {markdown(problem.message)} "
            f"| {markdown_code(problem.path)} |"
            for problem in problems
        ]
        lines.append("")
    lines += ["| checked | count |", "|---|---|"]
    lines += [f"| {markdown(name.replace('_', ' '))} | {count} |" for name, count in findings.checked.items()]
    lines += ["", *(f"- {markdown(note)}" for note in findings.notes)]
    return "\n".join(lines).rstrip() + "\n"
