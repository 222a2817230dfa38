"""What an audit finds: problems, notes and counts, as its parts collect them and `vico audit --json` prints
them."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.audit.facts import Facts
from pipeline.storage.lookup import storage_of

CHECKED = ("stages", "files", "bytes", "inputs", "metrics", "mlflow_runs", "mlflow_metrics")
"""What is counted."""


@dataclass(frozen=True)
class Problem:
    """A recorded fact that no longer holds. `stage` is `pipeline` for what belongs to the run as a whole."""

    stage: str
    kind: str
    path: str
    message: str


@dataclass
class Findings:
    """All that an audit finds, and the `facts` that it read. `noted` (text -> stages) is worth knowing, but
    nothing recorded is wrong."""

    problems: list[Problem] = field(default_factory=list)
    noted: dict[str, list[str]] = field(default_factory=dict)
    checked: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CHECKED, 0)))
    facts: Facts = field(default_factory=Facts)

    def problem(self, stage: str, kind: str, path: Path | str, message: str) -> None:
        address = storage_of(path).address(path) if isinstance(path, Path) else path
        self.problems.append(Problem(stage, kind, address, message))

    def note(self, stage: str, text: str) -> None:
        self.noted.setdefault(text, []).append(stage)

    @property
    def notes(self) -> list[str]:
        """Return one line per note, with the stages that it is about."""
        return [f"{', '.join(dict.fromkeys(stages))}: {text}" for text, stages in self.noted.items()]

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "problems": [asdict(problem) for problem in self.problems],
            "checked": dict(self.checked),
            "notes": self.notes,
        }
