"""Metrics of a training by step: written by rank 0, read over all attempts, drawn as a curve."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from stages.parts import Parts


class MetricsFile:
    """Appends metrics by step, one JSON object a line, each line in one write."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), "metrics": dict(metrics)}) + "\n")

    def sync(self) -> None:
        """Lines so far outlast a crash of the machine."""
        os.fsync(self._file.fileno())


def read_metrics(parts: Parts) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of the whole training over all attempts, each metric of a step once (the first report
    counts; a validation that was put off stands in a line of its own)."""
    steps: dict[int, dict[str, float]] = {}
    attempts = sorted(
        (parts.folder / "attempts").glob("*/metrics.jsonl"), key=lambda path: int(path.parent.name)
    )
    for path in attempts:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # a killed writer leaves half a line
                entry = json.loads(line)
                found = steps.setdefault(entry["step"], {})
                found.update({n: value for n, value in entry["metrics"].items() if n not in found})
    return sorted(steps.items())


class NewSteps:
    """The steps of an attempt as they are reported, asked often: only what was added since is read."""

    def __init__(self, parts: Parts):
        self._path = parts.attempt_folder / "metrics.jsonl"
        self.last = max((step for step, _ in read_metrics(parts)), default=0)
        """The last step that is reported."""
        self._read_bytes = 0

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, metrics) of what was added."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if line.endswith(b"\n"):
                    entry = json.loads(line)
                    self.last = max(self.last, entry["step"])
                    self._read_bytes += len(line)
                    yield entry["step"], entry["metrics"]


CURVE_METRICS = ("loss", "grad_norm", "learning_rate", "kl_per_token", "share_compressed", "accuracy")


def publish_curve(parts: Parts) -> dict[str, float]:
    """Writes `curve.parquet` (step, name, value) of the figures that depend on the data alone; returns the
    last ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        (step, name, value)
        for step, metrics in read_metrics(parts)
        for name, value in metrics.items()
        if name in CURVE_METRICS or name.startswith("validation_")
    ]
    steps, names, values = zip(*rows, strict=True) if rows else ((), (), ())
    pq.write_table(pa.table({"step": steps, "name": names, "value": values}), parts.partial("curve.parquet"))
    parts.publish("curve.parquet", replace=True)
    return {f"last_{name}": value for _, name, value in rows}
