"""How often the ranks of a training were started again, by kind, over all of its attempts."""

import json
from pathlib import Path

from stages.parts import Parts
from stages.training_metrics import MetricsFile

FAILURE, PREEMPTION = "worker failure", "preemption"
RESTARTS_FILE = "restarts.jsonl"
"""In an attempt's folder: a line of metrics for each failure and preemption, numbered over all attempts."""


class Restarts:
    """Counts failures and preemptions of ranks; what earlier attempts had is counted along."""

    def __init__(self, parts: Parts):
        self._totals, self._number = restart_counts(parts), len(_lines(parts))
        self._file = MetricsFile(parts.attempt_folder / RESTARTS_FILE)

    def add(self, kind: str) -> None:
        """One more; reported at once, also where it is the last that the site allows."""
        self._totals[_name(kind)] += 1
        self._number += 1
        counts = {f"num_{name}": float(count) for name, count in self._totals.items() if count}
        self._file.append(self._number, counts)


def restart_counts(parts: Parts) -> dict[str, int]:
    """`worker_failures` and `preemptions` of all attempts so far."""
    totals = {_name(FAILURE): 0, _name(PREEMPTION): 0}
    for line in _lines(parts):
        for name in totals:  # each line has the totals of its time
            totals[name] = max(totals[name], int(json.loads(line)["metrics"].get(f"num_{name}", 0)))
    return totals


def _name(kind: str) -> str:
    return f"{kind.replace(' ', '_')}s"


def _lines(parts: Parts) -> list[str]:
    files: list[Path] = sorted((parts.folder / "attempts").glob(f"*/{RESTARTS_FILE}"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    return [line for line in lines if line.endswith("\n")]  # a killed writer leaves half a line
