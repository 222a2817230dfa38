"""What an audit finds, as the parts of it collect it and `vico audit --json` prints it."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    """What an audit finds. `notes` are worth knowing, and no fault of what is recorded."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FACTS_CHECKED, 0)))

    def problem(self, stage: str, kind: str, path: Path | str, message: str) -> None:
        self.problems.append(Problem(stage, kind, str(path), message))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "problems": [asdict(one) for one in self.problems],
            "checked": dict(self.checked),
            "notes": self.notes,
        }
