"""The metric files of an attempt: their names, the format of a line, and how lines are written and read.

A metric file has one JSON object per line: `{"step": 3, "time": 1712000000.5, "metrics": {"loss": 0.5}}`,
with the time in seconds since 1970. Stages and node samplers append; tracking, the audit and the trainings
read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vico.bounded_text import bounded_json
from vico.own_files import no_links

logger = logging.getLogger(__name__)
_MAX_LINE_BYTES = 2**20
STEP_METRICS_FILE = "metrics.jsonl"
"""Metrics of a stage by step, in the folder of the attempt."""
METRIC_FILES = "*.jsonl"
"""Pattern of all metric files in the folder of an attempt."""


def system_metrics_file(node: str) -> str:
    """Return the name of the file with the system metrics of a node."""
    return f"system-{node}.jsonl"


@dataclass(frozen=True)
class MetricLine:
    """What was measured at one step. `time_s` is in seconds since 1970."""

    step: int
    time_s: float
    metrics: Mapping[str, float]

    def text(self) -> str:
        """Return the line as it is written, with its newline."""
        return json.dumps({"step": self.step, "time": self.time_s, "metrics": dict(self.metrics)}) + "\n"

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Return the content of a line; raise ValueError if the line is damaged."""
        try:
            content = bounded_json(text, _MAX_LINE_BYTES)
            metrics = {str(name): float(value) for name, value in content["metrics"].items()}
            return cls(int(content["step"]), float(content["time"]), metrics)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class LineInFile:
    """A whole line of a metric file. `end` is the byte at which the next line begins."""

    path: Path
    end: int
    content: MetricLine | None
    """None if the line is damaged."""


class MetricsWriter:
    """Appends to a metric file. Each line is one write, so a kill leaves at most half a line at the end."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", opener=no_links)  # noqa: SIM115 - closed by close

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step with the time of now."""
        self._file.write(MetricLine(step, time.time(), metrics).text().encode())
        self._file.flush()

    def sync(self) -> None:
        """Wait until the lines written so far would survive a crash of the machine."""
        os.fsync(self._file.fileno())

    def fileno(self) -> int:
        """Return the file descriptor, for locks."""
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def lines_in_file(path: Path, start: int = 0, end: float = math.inf) -> Iterator[LineInFile]:
    """Yield the whole lines between byte `start`, where a line begins, and byte `end`.

    Half a line at the end (its writer was killed, or is still writing) is left out. A damaged line is logged
    and yielded without content.
    """
    with path.open("rb") as file:
        file.seek(start)
        line_end = start
        for text in file:
            line_end += len(text)
            if not text.endswith(b"\n") or line_end > end:
                return
            yield LineInFile(path, line_end, _content(path, line_end, text))


def metric_lines(path: Path) -> Iterator[MetricLine]:
    """Yield the content of every whole line that is not damaged."""
    for line in lines_in_file(path):
        if line.content is not None:
            yield line.content


def last_metric_line(path: Path) -> MetricLine | None:
    """Return the last whole line that is not damaged, or None; parse no more lines than needed."""
    *whole, _ = path.read_bytes().split(b"\n")
    for text in reversed(whole):
        try:
            return MetricLine.parse(text)
        except ValueError:
            continue
    return None


def _content(path: Path, end: int, text: bytes) -> MetricLine | None:
    try:
        return MetricLine.parse(text)
    except ValueError as error:
        logger.warning("%s: the line that ends at byte %d is damaged (%s); it is skipped", path, end, error)
        return None
