"""What an audit finds, as the parts of it collect it and `vico audit --json` prints it."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.storage import storage_of

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
