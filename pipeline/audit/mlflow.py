"""MLflow held against the records: what `pipeline/tracking/sync.py` was to tell it, asked back. Writes nothing but
what `reap` sends, and the note by which `vico run` and `reap` know that MLflow lacks something.

The second door of MLflow: the tracker must stay small, and reading it back is another purpose. MLflow is
imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.site import Site
from pipeline.audit.findings import Findings
from pipeline.results.metric_lines import MetricFiles
from pipeline.results.run_results import record_of
from pipeline.results.runs import ENDED, PIPELINE, RunFile, Runs
from pipeline.storage.folder import Conflict
from pipeline.tracking.client import active_run, metric_key, mlflow_client, one_line
from pipeline.tracking.desired import Projection, of_pipeline, of_stage
from pipeline.tracking.outputs import DIGEST_LENGTH
from pipeline.tracking.sent import STATE_FILE, SentState, is_incomplete, mark_incomplete
from pipeline.tracking.sync import PARAM_LENGTH, TAG_LENGTH
from vico.errors import Unreachable, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


_ALL_LINES = 1 << 30
_LARGEST = 1.7e308
"""Databases keep inf as the largest float."""
_MOVING_TAGS = frozenset({"vico.output", "vico.storage", "vico.reused_child"})
"""Places, which change when a store is moved."""
_DRIVER_TAGS = frozenset({"mlflow.source.git.commit", "vico.git_dirty", "vico.host", "vico.world_size"})
"""Without a record these are of the process that told MLflow, which is not this one."""


def audit_mlflow(run: RunFile, site: Site, found: Findings) -> None:
    """Every MLflow run of this run against run.json, records and metrics files. After a problem mlflow.json
    no longer says that MLflow has all, so that the next `vico run` or `reap` tells it again."""
    num_before = len(found.problems)
    folder = Runs(site.storage).run_folder(run.run)
    state = SentState.of(folder, site.tracking_place)
    _compare(run, site, folder, state, found)
    kinds = {one.kind for one in found.problems[num_before:]} - {"mlflow_unreachable"}
    if not kinds or run.state not in ENDED:
        return
    try:
        mark_incomplete(folder, site)
    except (OSError, UserError, Unreachable, Conflict) as error:
        found.note(PIPELINE, f"`vico run` will not tell MLflow again: {STATE_FILE} was not written ({error})")


def _compare(run: RunFile, site: Site, folder: Path, state: SentState, found: Findings) -> None:
    ids = {PIPELINE: run.mlflow_run_id, **{name: one.mlflow_run_id for name, one in run.stages.items()}}
    ids |= {name: sent.id for name, sent in state.runs.items()}
    if not any(ids.values()):
        found.note(
            PIPELINE, f"MLflow was not asked: run {run.run} was never tracked at {site.tracking_place}"
        )
        return
    if run.state == "done" and is_incomplete(folder, site):
        message = "MLflow lacks something of the run; `vico audit --reap` sends it"
        found.problem(PIPELINE, "mlflow_incomplete", folder / STATE_FILE, message)
    database = Path(site.tracking_uri.removeprefix("sqlite:///"))
    if site.tracking_uri.startswith("sqlite:///") and not database.is_file():
        found.problem(PIPELINE, "mlflow_missing", database, "MLflow's database is not there")
        return
    try:
        client = mlflow_client(site.tracking_uri)
        for name, run_id in ids.items():
            projection = _projection(run, name, site, found)
            if projection is not None:
                _Comparison(client, run, projection, run_id, state, found).make()
    except Exception as error:  # of a server or a database: what cannot be asked does not hold
        found.problem(PIPELINE, "mlflow_unreachable", site.tracking_place, one_line(error))


def _projection(run: RunFile, name: str, site: Site, found: Findings) -> Projection | None:
    """What MLflow should show; None where the store cannot say, which the audit of the store has told."""
    try:
        if name == PIPELINE:
            return of_pipeline(run, site)
        record = record_of(run, name, site.storage)
        if record is None or not record.is_superseded:
            return of_stage(run, name, site)
        found.note(name, "made again by another run; what MLflow shows of this one was not compared")
        return None
    except UserError:
        found.note(name, "MLflow cannot be held against a record that is damaged")
        return None


class _Comparison:
    """One MLflow run against its projection."""

    def __init__(
        self,
        client: MlflowClient,
        run: RunFile,
        projection: Projection,
        run_id: str | None,
        state: SentState,
        found: Findings,
    ):
        self.client, self.run, self.projection, self.run_id = client, run, projection, run_id
        self.found = found
        sent = state.runs.get(projection.name)
        self.is_superseded = sent is not None and sent.began != projection.began

    def make(self) -> None:
        if self.is_superseded:
            self.found.note(self.projection.name, "made again by another run; MLflow's is of the earlier one")
            return
        run = self._shown()
        if run is None:
            self._problem(
                "mlflow_missing", "the MLflow run is deleted; run the command again to make it anew"
            )
            return
        self.found.checked["mlflow_runs"] += 1
        if run.info.status != self.projection.status:
            message = f"status is {run.info.status}, the store says {self.projection.status}"
            self._problem("mlflow_status", message)
        self._values("mlflow_params", "param", run.data.params, self._params())
        self._values("mlflow_tags", "tag", run.data.tags, self._tags())
        self._datasets(run)
        self._metrics()

    def _shown(self) -> Any:
        """The MLflow run by its id or, where a kill kept the id from our files, by its tags; or None."""
        run = active_run(self.client, self.run_id) if self.run_id else None
        experiment = self.client.get_experiment_by_name(self.run.experiment) if run is None else None
        if experiment is not None:
            wanted = {"run": self.run.run, "stage": self.projection.name, "began": self.projection.began}
            filters = " and ".join(f"tags.`vico.{name}` = '{value}'" for name, value in wanted.items())
            run = next(
                iter(self.client.search_runs([experiment.experiment_id], filters, max_results=1)), None
            )
        self.run_id = run.info.run_id if run is not None else self.run_id
        return run

    def _problem(self, kind: str, message: str) -> None:
        self.found.problem(self.projection.name, kind, f"mlflow:{self.run_id}", message)

    def _params(self) -> dict[str, str]:
        return {name: value[:PARAM_LENGTH] for name, value in self.projection.params.items()}

    def _tags(self) -> dict[str, str]:
        left_out = _MOVING_TAGS
        if "vico.output_digest" not in self.projection.tags:
            left_out |= _DRIVER_TAGS
        tags = self.projection.tags.items()
        return {name: value[:TAG_LENGTH] for name, value in tags if value and name not in left_out}

    def _values(self, kind: str, word: str, shown: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        for name, value in wanted.items():
            if name not in shown:
                self._problem(kind, f"{word} {name} is not there")
            elif shown[name] != value:
                self._problem(kind, f"{word} {name} is {shown[name][:80]!r}, recorded is {value[:80]!r}")

    def _datasets(self, run: Any) -> None:
        given = [one.dataset for one in run.inputs.dataset_inputs] if run.inputs else []
        shown = {(one.name, one.digest) for one in given}
        for one in self.projection.datasets:
            if (one.name, one.digest[:DIGEST_LENGTH]) not in shown:
                self._problem("mlflow_datasets", f"data set {one.name} {one.digest[:12]} is not there")

    def _metrics(self) -> None:
        """Every step of every metric is there once, with the value that was written first."""
        for key, wanted in wanted_metrics(self.projection).items():
            history = self.client.get_metric_history(self.run_id, key)
            shown = {point.step: point.value for point in history}
            self.found.checked["mlflow_metrics"] += len(history)
            missing = sorted(set(wanted) - set(shown))
            if missing:
                message = (
                    f"metric {key} has {len(shown)} steps of {len(wanted)}; step {missing[0]} is missing"
                )
                self._problem("mlflow_metrics", message)
            if len(history) > len(shown):
                self._problem("mlflow_metrics", f"metric {key} has {len(history) - len(shown)} steps twice")
            more = sorted(set(shown) - set(wanted))
            if more:
                message = f"metric {key} has {len(more)} steps that no attempt wrote, the first is {more[0]}"
                self._problem("mlflow_metrics", message)
            wrong = [step for step in sorted(set(wanted) & set(shown)) if not same(wanted[step], shown[step])]
            if wrong:
                step = wrong[0]
                message = f"metric {key} is {shown[step]} at step {step}, {wanted[step]} is recorded"
                self._problem("mlflow_metrics", message)


def wanted_metrics(projection: Projection) -> dict[str, dict[int, float]]:
    """MLflow's name of each metric -> step -> value; of a step done twice, the first."""
    wanted: dict[str, dict[int, float]] = {}
    lines = MetricFiles(projection.attempts).unread(_ALL_LINES) if projection.attempts else []
    for line in lines:
        for name, value in line.metrics.items():
            wanted.setdefault(metric_key(name), {}).setdefault(line.step, value)
    for name, value in projection.counts.items():
        wanted.setdefault(metric_key(f"summary/{name}"), {}).setdefault(0, value)
    return wanted


def same(recorded: float, shown: float) -> bool:
    """Whether MLflow shows the value; not every database keeps nan and inf, or the last bit."""
    if not math.isfinite(recorded):
        return math.isnan(recorded) or abs(shown) > _LARGEST
    return math.isclose(recorded, shown, rel_tol=1e-12, abs_tol=1e-300)
