"""Params, tags, metrics and status of one MLflow run, sent as far as MLflow does not have them yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.results.attempt_metrics import GrowingMetrics
from pipeline.storage.lookup import storage_of
from pipeline.tracking.client import chunks, metric_key
from pipeline.tracking.desired import DesiredRun
from pipeline.tracking.sent import SentRun, SentSteps

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

# Limits of MLflow: metrics per batch, params or tags per batch, characters of a param, characters of a tag.
NUM_METRICS, NUM_PARAMS, PARAM_LENGTH, TAG_LENGTH = 1000, 100, 6000, 5000
SYSTEM = "system/"
"""Start of the names of the metrics of a node."""


@dataclass
class MetricProgress:
    """How far the metrics of one MLflow run were sent, as long as this process lives."""

    steps: SentSteps
    files: GrowingMetrics | None = None
    """The metric files of the stage's attempts; None before they were read."""


@dataclass(frozen=True)
class FieldSender:
    """Sends the fields of one MLflow run, and notes in `sent` and `progress` what MLflow has then."""

    client: MlflowClient
    desired: DesiredRun
    sent: SentRun
    progress: MetricProgress

    def send_params(self) -> None:
        from mlflow.entities import Param

        new = [(key, value) for key, value in self.desired.params.items() if key not in self.sent.params]
        for chunk in chunks(new, NUM_PARAMS):
            params = [Param(key, value[:PARAM_LENGTH]) for key, value in chunk]
            self.client.log_batch(self.sent.id, params=params, synchronous=True)
            self.sent.params.extend(key for key, _ in chunk)

    def send_tags(self, parent_id: str | None) -> None:
        from mlflow.entities import RunTag

        wanted = {key: value[:TAG_LENGTH] for key, value in self.desired.tags.items() if value}
        wanted |= self.desired.identity_tags
        if parent_id is not None:
            wanted["mlflow.parentRunId"] = parent_id
        new = [(key, value) for key, value in wanted.items() if self.sent.tags.get(key) != value]
        for chunk in chunks(new, NUM_PARAMS):
            tags = [RunTag(key, value) for key, value in chunk]
            self.client.log_batch(self.sent.id, tags=tags, synchronous=True)
            self.sent.tags.update(chunk)
        for key in [key for key in self.sent.tags if key.startswith("vico.") and key not in wanted]:
            self.client.delete_tag(self.sent.id, key)  # such as the error of a run that was resumed
            del self.sent.tags[key]

    def send_metrics(self, save: Callable[[], None]) -> None:
        """Send every step of every metric that MLflow does not have; of a step done twice, the first.

        `save` is called after every batch. Only lines that are in the storage are sent: a line that is lost
        with this machine must not be in MLflow, where it would take the step of the machine that resumes the
        stage.
        """
        attempts = self.desired.attempts
        if attempts is not None:
            if self.progress.files is None:
                self.progress.files = GrowingMetrics(attempts, storage_of(attempts).shared_bytes)
            while lines := self.progress.files.unread(NUM_METRICS):
                self._send_values(
                    (name, line.content.step, value, line.content.time_s)
                    for line in lines
                    if line.content is not None
                    for name, value in line.content.metrics.items()
                    if self.desired.has_system_metrics or not name.startswith(SYSTEM)
                )
                self.progress.files.take(lines)
                save()  # after an outage, sending takes minutes
        end_s = self.desired.end_s or self.desired.start_s
        self._send_values((name, 0, value, end_s) for name, value in self.desired.summary.items())

    def _send_values(self, values: Iterable[tuple[str, int, float, float]]) -> None:
        """Send (name, step, value, time in seconds) if MLflow does not have the step."""
        from mlflow.entities import Metric

        steps = self.progress.steps
        new: dict[tuple[str, int], Metric] = {}
        for name, step, value, time_s in values:
            key = metric_key(name)
            if steps.is_new(key, step):
                new.setdefault((key, step), Metric(key, value, int(time_s * 1000), step))
        for chunk in chunks(list(new.values()), NUM_METRICS):
            self.client.log_batch(self.sent.id, metrics=chunk, synchronous=True)
            for metric in chunk:
                steps.add(metric.key, metric.step)

    def send_status(self) -> None:
        if self.sent.status == self.desired.status:
            return
        if self.desired.is_ended:
            end_ms = int(self.desired.end_s * 1000) if self.desired.end_s else None
            self.client.set_terminated(self.sent.id, self.desired.status, end_ms)
        else:
            self.client.update_run(self.sent.id, status=self.desired.status)
        self.sent.status = self.desired.status
