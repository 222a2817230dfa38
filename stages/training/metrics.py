"""The step metrics of a training, which rank 0 writes: read over all attempts, followed, published as a
curve."""

from collections.abc import Iterator, Mapping

from cluster.metric_lines import STEP_METRICS_FILE, lines_in_file, metric_lines
from stages.outputs import CURVE_FILE
from stages.parts import Parts


def read_metrics(parts: Parts) -> list[tuple[int, dict[str, float]]]:
    """Return (step, metrics) for every step of the training over all attempts, in order of the steps.

    If a step reports a metric twice, the first report counts. A postponed validation has a line of its own.
    """
    steps: dict[int, dict[str, float]] = {}
    paths = (parts.folder / "attempts").glob(f"*/{STEP_METRICS_FILE}")
    numbered = (path for path in paths if path.parent.name.isdigit())  # not a copy of one, such as 1.bak
    for path in sorted(numbered, key=lambda path: int(path.parent.name)):
        for line in metric_lines(path):
            metrics = steps.setdefault(line.step, {})
            for name, value in line.metrics.items():
                metrics.setdefault(name, value)
    return sorted(steps.items())


class NewSteps:
    """The steps of an attempt as they are reported. Each `read` reads only what was added since the last."""

    def __init__(self, parts: Parts):
        self._path = parts.attempt_folder / STEP_METRICS_FILE
        self.last = max((step for step, _ in read_metrics(parts)), default=0)
        """The last step that was reported."""
        self._read_bytes = 0

    def read(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Yield (step, metrics) of the lines that were added."""
        if not self._path.exists():
            return
        for line in lines_in_file(self._path, self._read_bytes):
            self._read_bytes = line.end
            if line.content is not None:
                self.last = max(self.last, line.content.step)
                yield line.content.step, line.content.metrics


CURVE_METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "kl_per_token",
    "cross_entropy_per_token",
    "share_compressed",
    "accuracy",
)


def publish_curve(parts: Parts) -> dict[str, float]:
    """Write `curve.parquet` (step, name, value) of the metrics that depend on the data alone; return the
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
    pq.write_table(pa.table({"step": steps, "name": names, "value": values}), parts.partial(CURVE_FILE))
    parts.publish(CURVE_FILE, replace=True)
    return {f"last_{name}": value for _, name, value in rows}
