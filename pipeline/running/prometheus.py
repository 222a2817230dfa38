"""Prometheus metrics of a run, served by its driver: states of stages, steps, restarts, load of nodes.

Nothing is counted here. Each scrape reads run.json and the metric files of the attempts, which driver, ranks
and node samplers write, so the numbers are those of MLflow and of `vico status`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metric_lines import STEP_METRICS_FILE, MetricLine, last_metric_line, system_metrics_file
from cluster.site import Site
from pipeline.results.runs import RUN_FILE, RunFile, State

logger = logging.getLogger(__name__)
_STATES: tuple[str, ...] = get_args(State)
_STEP_METRICS = {
    "loss": "Loss of the last step.",
    "grad_norm": "Norm of the gradient of the last step.",
    "learning_rate": "Learning rate of the last step.",
    "tokens_per_second": "Tokens per second of the last step, over all ranks.",
    "tiles_per_second": "Tiles per second of the last step, over all ranks.",
    "seconds_step": "Seconds of the last step.",
    "seconds_data_wait": "Seconds that the last step waited for data.",
    "mfu": "Share of the peak TFLOP/s that the last step used.",
    "peak_memory_bytes": "Peak memory of rank 0.",
}
"""Metrics of training steps that have a name of their own; all others are `vico_step_metric`."""


@contextmanager
def serve_metrics(site: Site, run_folder: Path, host: str, port: int) -> Iterator[None]:
    """Answer GET /metrics until the end of the body."""
    registry = CollectorRegistry()
    registry.register(RunMetrics(site, run_folder))
    server, thread = start_http_server(port, addr=host, registry=registry)
    logger.info("metrics at http://%s:%d/metrics", host, port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RunMetrics(Collector):
    """The metrics of one run, read from its files at each scrape."""

    def __init__(self, site: Site, run_folder: Path) -> None:
        self.site, self.run_folder = site, run_folder

    def describe(self) -> list[Metric]:
        return []  # so that registering does not read the files

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; each has the label `run`."""
        run = RunFile.read(self.run_folder / RUN_FILE, "delete that run's folder")
        if run is None:
            return
        yield InfoMetricFamily(
            "vico_run", "The run.", {"run": run.run, "experiment": run.experiment, "site": self.site.name}
        )
        yield self._states(run)
        attempts = GaugeMetricFamily("vico_stage_attempts", "Attempts at a stage.", labels=("run", "stage"))
        ranks = GaugeMetricFamily("vico_ranks", "Ranks of a training.", labels=("run", "stage"))
        for name, entry in run.stages.items():
            attempts.add_metric((run.run, name), entry.attempt)
            if entry.state == "running":
                ranks.add_metric((run.run, name), self.site.resources.of_stage(name).workers)
        yield from (attempts, ranks, self._restarts(run), *self._steps(run), self._nodes(run))

    def _states(self, run: RunFile) -> Metric:
        states = GaugeMetricFamily(
            "vico_stage_state", "1 for the state that a stage is in.", labels=("run", "stage", "state")
        )
        for name, entry in run.stages.items():
            for state in _STATES:
                states.add_metric((run.run, name, state), float(entry.state == state))
        return states

    def _restarts(self, run: RunFile) -> Metric:
        """Return how often ranks were started again, over all attempts."""
        restarts = CounterMetricFamily(
            "vico_restarts", "Starts of the ranks after a failure or preemption.", labels=("run", "stage")
        )
        for name, folder in self._stage_folders(run):
            files = folder.glob("attempts/*/restarts.jsonl")
            restarts.add_metric((run.run, name), sum(path.read_bytes().count(b"\n") for path in files))
        return restarts

    def _steps(self, run: RunFile) -> Iterator[Metric]:
        """Yield the last step of each stage, and what was measured in it."""
        labels = ("run", "stage")
        step = GaugeMetricFamily("vico_step", "Steps that a stage has done.", labels=labels)
        named = {
            name: GaugeMetricFamily(f"vico_{name}", text, labels=labels)
            for name, text in _STEP_METRICS.items()
        }
        other = GaugeMetricFamily(
            "vico_step_metric", "Other metrics of the last step.", labels=(*labels, "metric")
        )
        for stage, folder in self._attempt_folders(run):
            line = _last_line(folder / STEP_METRICS_FILE)
            if line is None:
                continue
            step.add_metric((run.run, stage), line.step)
            for name, value in line.metrics.items():
                if name in named:
                    named[name].add_metric((run.run, stage), value)
                else:
                    other.add_metric((run.run, stage, name), value)
        yield from (step, *named.values(), other)

    def _nodes(self, run: RunFile) -> Metric:
        """Return the last sample of each node that works on a stage."""
        load = GaugeMetricFamily(
            "vico_node", "Load of a node, by MLflow's names.", labels=("run", "stage", "node", "metric")
        )
        prefix, suffix = system_metrics_file("NODE").split("NODE")
        for stage, folder in self._attempt_folders(run):
            if run.stages[stage].state != "running":
                continue
            for path in sorted(folder.glob(f"{prefix}*{suffix}")):
                line, node = _last_line(path), path.name.removeprefix(prefix).removesuffix(suffix)
                for name, value in line.metrics.items() if line is not None else ():
                    load.add_metric((run.run, stage, node, name), value)
        return load

    def _stage_folders(self, run: RunFile) -> Iterator[tuple[str, Path]]:
        for name, entry in run.stages.items():
            yield name, self.site.storage / name / entry.fingerprint

    def _attempt_folders(self, run: RunFile) -> Iterator[tuple[str, Path]]:
        for name, folder in self._stage_folders(run):
            yield name, folder / "attempts" / str(run.stages[name].attempt)


def _last_line(path: Path) -> MetricLine | None:
    try:
        return last_metric_line(path)
    except FileNotFoundError:
        return None
