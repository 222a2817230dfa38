"""What an audit finds, as the parts of it collect it and `vico audit --json` prints it."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.results.runs import RunFile, Runs
from pipeline.storage.lookup import storage_of

FACTS_CHECKED = ("stages", "files", "bytes", "inputs", "metrics", "mlflow_runs", "mlflow_metrics")


@dataclass(frozen=True)
class Problem:
    """Something recorded that does not hold. `stage` is `pipeline` for what belongs to the run as a whole."""

    stage: str
    kind: str
    path: str
    message: str


@dataclass
class Findings:
    """What an audit finds. `noted` (text -> stages) is worth knowing, and no fault of what is recorded."""

    problems: list[Problem] = field(default_factory=list)
    noted: dict[str, list[str]] = field(default_factory=dict)
    checked: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FACTS_CHECKED, 0)))

    def problem(self, stage: str, kind: str, path: Path | str, message: str) -> None:
        place = storage_of(path).place(path) if isinstance(path, Path) else path
        self.problems.append(Problem(stage, kind, place, message))

    def note(self, stage: str, text: str) -> None:
        self.noted.setdefault(text, []).append(stage)

    @property
    def notes(self) -> list[str]:
        """One line for each note, with the stages that it is about."""
        return [f"{', '.join(dict.fromkeys(stages))}: {text}" for text, stages in self.noted.items()]

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "problems": [asdict(one) for one in self.problems],
            "checked": dict(self.checked),
            "notes": self.notes,
        }


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
    from pipeline.tracking.reap import log_texts

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
