"""Metrics that attempts at a stage wrote (`attempts/<n>/*.jsonl`), read as they grow. Used by tracking."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricLine:
    """What was measured at one step. `end`: where the next line of the file begins."""

    path: Path
    end: int
    step: int
    time_s: float
    metrics: Mapping[str, float]


class MetricFiles:
    """The lines of all attempts at a stage, earlier attempts first; each is given until it was taken.

    `readable` says how many bytes of a file may be read.
    """

    def __init__(self, attempts: Path, readable: Callable[[Path], float] = lambda path: math.inf):
        self.attempts, self.readable = attempts, readable
        self._taken: dict[Path, int] = {}

    def unread(self, num_values: int) -> list[MetricLine]:
        """The next whole lines that were not taken, about `num_values` values of them.

        Half a line at the end of a file (its writer was killed, or still writes) is left. A line that is no
        metrics is logged and given without values.
        """
        lines: list[MetricLine] = []
        found = 0
        for path in self._paths():
            end, most = self._taken.get(path, 0), self.readable(path)
            with path.open("rb") as file:
                file.seek(end)
                for text in file:
                    if found >= num_values or not text.endswith(b"\n") or end + len(text) > most:
                        break
                    end += len(text)
                    lines.append(_line(path, end, text))
                    found += max(1, len(lines[-1].metrics))
        return lines

    def take(self, lines: list[MetricLine]) -> None:
        for line in lines:
            self._taken[line.path] = line.end

    def _paths(self) -> list[Path]:
        found = [path for path in self.attempts.glob("*/*.jsonl") if path.parent.name.isdigit()]
        return sorted(found, key=lambda path: (int(path.parent.name), path.name))


def _line(path: Path, end: int, text: bytes) -> MetricLine:
    try:
        entry = json.loads(text)
        metrics = {str(name): float(value) for name, value in entry["metrics"].items()}
        return MetricLine(path, end, int(entry["step"]), float(entry["time"]), metrics)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: the line that ends at byte %d is no metrics (%s); left out", path, end, error)
        return MetricLine(path, end, 0, 0.0, {})
