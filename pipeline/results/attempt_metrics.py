"""The metrics of all attempts at a stage: read while they are written, or all at once.

Used by tracking, the audit, `vico diff` and `vico plan`; the format of the files is in
`cluster/metric_lines.py`.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.metric_lines import METRIC_FILES, LineInFile, MetricLine, lines_in_file


class GrowingMetrics:
    """The metric lines of all attempts at a stage, earlier attempts first, read as the files grow.

    `readable_bytes` returns how many bytes of a file may be read. A line is returned until it has been taken.
    """

    def __init__(self, attempts: Path, readable_bytes: Callable[[Path], float] = lambda path: math.inf):
        self.attempts, self.readable_bytes = attempts, readable_bytes
        self._taken: dict[Path, int] = {}

    def unread(self, num_values: int) -> list[LineInFile]:
        """Return the next lines that were not taken, with about `num_values` values together."""
        lines: list[LineInFile] = []
        read_values = 0
        for path in _metric_files(self.attempts):
            for line in lines_in_file(path, self._taken.get(path, 0), self.readable_bytes(path)):
                lines.append(line)
                read_values += max(1, len(line.content.metrics) if line.content else 0)
                if read_values >= num_values:
                    return lines
        return lines

    def take(self, lines: list[LineInFile]) -> None:
        for line in lines:
            self._taken[line.path] = line.end


def lines_of_attempts(attempts: Path) -> Iterator[LineInFile]:
    """Yield the whole lines of all metric files of all attempts, earlier attempts first."""
    for path in _metric_files(attempts):
        yield from lines_in_file(path)


def metrics_of_attempts(attempts: Path) -> Iterator[MetricLine]:
    """Yield the content of all lines that are not damaged, earlier attempts first."""
    return (line.content for line in lines_of_attempts(attempts) if line.content is not None)


def first_values(attempts: Path) -> dict[str, dict[int, float]]:
    """Return metric -> step -> value; of a step that was done twice, the value that was written first."""
    values: dict[str, dict[int, float]] = {}
    for line in metrics_of_attempts(attempts):
        for name, value in line.metrics.items():
            values.setdefault(name, {}).setdefault(line.step, value)
    return values


def _metric_files(attempts: Path) -> list[Path]:
    paths = [path for path in attempts.glob(f"*/{METRIC_FILES}") if path.parent.name.isdigit()]
    return sorted(paths, key=lambda path: (int(path.parent.name), path.name))
