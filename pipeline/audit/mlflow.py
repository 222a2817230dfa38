"""Compares MLflow with the records: what `pipeline/tracking/sync.py` sent is read back. Called by the audit.

Sends nothing. After a problem it notes in mlflow.json that MLflow lacks something, so that the next `vico
run` or `vico audit --reap` sends it. MLflow is imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.site import Site
from cluster.sqlite_uris import sqlite_path
from pipeline.audit.findings import Findings
from pipeline.audit.seal import sha256_of
from pipeline.results.attempt_metrics import first_values
from pipeline.results.run_results import record_of
from pipeline.results.runs import ENDED, PIPELINE, RunFile, Runs
from pipeline.storage.folder import Conflict
from pipeline.tracking.artifact_roots import lost_root, moved_roots
from pipeline.tracking.client import (
    active_experiment,
    active_run,
    error_line,
    metric_key,
    mlflow_client,
    tagged_run,
)
from pipeline.tracking.desired import DesiredRun, desired_pipeline_run, desired_stage_run
from pipeline.tracking.fields import PARAM_LENGTH, SYSTEM, TAG_LENGTH
from pipeline.tracking.outputs import DIGEST_LENGTH
from pipeline.tracking.sent import STATE_FILE, SentState, database_is_missing, is_incomplete, mark_incomplete
from vico.errors import Unreachable, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LARGEST = 1.7e308
"""Databases store inf as the largest float."""
_MOVING_TAGS = frozenset({"vico.output", "vico.storage", "vico.storage_id", "vico.reused_child"})
"""Addresses, which change when a store is moved."""
_DRIVER_TAGS = frozenset({"mlflow.source.git.commit", "vico.git_dirty", "vico.host", "vico.world_size"})
"""Without a record these describe the process that sent them, which is not this one."""


def audit_mlflow(run: RunFile, site: Site, findings: Findings) -> None:
    """Compare every MLflow run of this run with run.json, records and metric files.

    After a problem, mlflow.json no longer says that MLflow has everything.
    """
    num_before = len(findings.problems)
    folder = Runs(site.storage).run_folder(run.run)
    _compare(run, site, folder, findings)
    kinds = {problem.kind for problem in findings.problems[num_before:]} - {"mlflow_unreachable"}
    if not kinds or run.state not in ENDED:
        return
    try:
        mark_incomplete(folder, site)
    except (OSError, UserError, Unreachable, Conflict) as error:
        findings.note(
            PIPELINE, f"`vico run` will not update MLflow: {STATE_FILE} could not be written ({error})"
        )


def _compare(run: RunFile, site: Site, folder: Path, findings: Findings) -> None:
    state = SentState.of(folder, site)
    ids = {PIPELINE: run.mlflow_run_id, **{name: entry.mlflow_run_id for name, entry in run.stages.items()}}
    ids |= {name: sent.id for name, sent in state.runs.items()}
    lacks_something = is_incomplete(folder, site)
    if not any(ids.values()) and not lacks_something:
        text = f"MLflow was not checked: run {run.run} was never tracked at {site.tracking_address}"
        findings.note(PIPELINE, text)
        return
    if run.state in ENDED and lacks_something:
        _report_incomplete(run, folder, findings)
    if not any(ids.values()):
        return
    database = sqlite_path(site.tracking_uri)
    if database is not None and database_is_missing(site):
        message = "MLflow's database is missing; `vico audit --reap` sends everything to a new one"
        findings.problem(PIPELINE, "mlflow_missing", database, message)
        return
    try:
        client = mlflow_client(site.tracking_uri)
        if not _has_experiment(client, run, site, findings):
            return
        for name, run_id in ids.items():
            desired = _desired_run(run, name, site, findings)
            if desired is None:
                continue
            sent = state.runs.get(name)
            if sent is not None and sent.began != desired.began:
                findings.note(name, "made again by another run; MLflow shows the earlier one")
                continue
            _compare_run(client, run, desired, run_id, findings)
    except Exception as error:  # from a server or a database
        findings.problem(PIPELINE, "mlflow_unreachable", site.tracking_address, error_line(error))


def _report_incomplete(run: RunFile, folder: Path, findings: Findings) -> None:
    text = "MLflow lacks something of the run; `vico audit --reap` sends it"
    if run.state == "done":
        findings.problem(PIPELINE, "mlflow_incomplete", folder / STATE_FILE, text)
    else:
        findings.note(PIPELINE, text)


def _has_experiment(client: MlflowClient, run: RunFile, site: Site, findings: Findings) -> bool:
    """Check that artifacts are kept where the store is now. Return False if somebody deleted the experiment,
    and with it all its runs."""
    try:
        experiment = active_experiment(client, run.experiment, site)
    except UserError as deleted:
        findings.problem(PIPELINE, "mlflow_missing", f"mlflow:{run.experiment}", str(deleted))
        return False
    for root in moved_roots(site):
        message = f"MLflow's {root.text}; the next `vico run` or `vico audit --reap` corrects it"
        findings.problem(PIPELINE, "mlflow_artifacts", str(root.former_store), message)
    if experiment is not None:
        lost = lost_root(site, run.experiment, experiment.artifact_location)
        if lost is not None:
            findings.problem(PIPELINE, "mlflow_artifacts", experiment.artifact_location, lost)
    return True


def _desired_run(run: RunFile, name: str, site: Site, findings: Findings) -> DesiredRun | None:
    """Return what MLflow should show; None if the record is damaged or replaced, which is then noted."""
    try:
        if name == PIPELINE:
            return desired_pipeline_run(run, site)
        record = record_of(run, name, site.storage)
        if record is None or not record.is_superseded:
            return desired_stage_run(run, name, site)
        findings.note(name, "made again by another run; what MLflow shows of this one was not compared")
        return None
    except UserError:
        findings.note(name, "MLflow cannot be compared with a damaged record")
        return None


def _compare_run(
    client: MlflowClient, run: RunFile, desired: DesiredRun, run_id: str | None, findings: Findings
) -> None:
    shown = active_run(client, run_id) if run_id else None
    if shown is None:  # a kill may have come before the id was saved
        experiment = client.get_experiment_by_name(run.experiment)
        tags = desired.identity_tags
        shown = tagged_run(client, experiment.experiment_id, tags) if experiment is not None else None
    if shown is None:
        message = "the MLflow run was deleted; run the command again to create a new one"
        findings.problem(desired.name, "mlflow_missing", f"mlflow:{run_id}", message)
        return
    findings.checked["mlflow_runs"] += 1
    _Comparison(client, desired, shown, findings).compare()


@dataclass(frozen=True)
class _Comparison:
    """What one MLflow run should show, and what it shows."""

    client: MlflowClient
    desired: DesiredRun
    shown: Run
    findings: Findings
    _metrics: dict[str, str] = field(default_factory=dict)
    """Metric -> number of points and digest of their steps and values."""

    def compare(self) -> None:
        status = self.shown.info.status
        if status != self.desired.status:
            self._problem("mlflow_status", f"status is {status}, the store says {self.desired.status}")
        self._compare_texts("mlflow_params", "param", self.shown.data.params, self._params())
        self._compare_texts("mlflow_tags", "tag", self.shown.data.tags, self._tags())
        self._compare_datasets()
        for key, wanted in wanted_metrics(self.desired).items():
            self._compare_metric(key, wanted)
        self.findings.facts.mlflow[self.desired.name] = {
            "id": self.shown.info.run_id,
            "status": status,
            "params": dict(self.shown.data.params),
            "tags": {name: self.shown.data.tags.get(name) for name in self._tags()},
            "datasets": sorted(f"{name} {digest}" for name, digest in self._datasets()),
            "metrics": self._metrics,
        }

    def _problem(self, kind: str, message: str) -> None:
        path = f"mlflow:{self.shown.info.run_id}"
        self.findings.problem(self.desired.name, kind, path, message)

    def _params(self) -> dict[str, str]:
        # MLflow keeps the first value of a param, and the paths of a resumed run may be others.
        params = self.desired.params.items()
        return {name: value[:PARAM_LENGTH] for name, value in params if not name.startswith("inputs.")}

    def _tags(self) -> dict[str, str]:
        left_out = _MOVING_TAGS
        if "vico.output_digest" not in self.desired.tags:
            left_out |= _DRIVER_TAGS
        tags = self.desired.tags.items()
        return {name: value[:TAG_LENGTH] for name, value in tags if value and name not in left_out}

    def _compare_texts(
        self, kind: str, word: str, shown: Mapping[str, str], wanted: Mapping[str, str]
    ) -> None:
        for name, value in wanted.items():
            if name not in shown:
                self._problem(kind, f"{word} {name} is missing")
            elif shown[name] != value:
                self._problem(kind, f"{word} {name} is {shown[name]!r}, recorded is {value!r}")

    def _compare_datasets(self) -> None:
        shown = self._datasets()
        for wanted in self.desired.datasets:
            if (wanted.name, wanted.digest[:DIGEST_LENGTH]) not in shown:
                self._problem("mlflow_datasets", f"data set {wanted.name} {wanted.digest[:12]} is missing")

    def _datasets(self) -> set[tuple[str, str]]:
        inputs = self.shown.inputs.dataset_inputs if self.shown.inputs else []
        return {(logged.dataset.name, logged.dataset.digest) for logged in inputs}

    def _compare_metric(self, key: str, wanted: Mapping[int, float]) -> None:
        """Check that every step is there once, with the value that was written first."""
        history = self.client.get_metric_history(self.shown.info.run_id, key)
        shown = {point.step: point.value for point in history}
        self.findings.checked["mlflow_metrics"] += len(history)
        points = sorted((point.step, repr(point.value)) for point in history)
        self._metrics[key] = f"{len(points)} points, sha256 {sha256_of(points)}"
        missing = sorted(set(wanted) - set(shown))
        if missing:
            message = f"metric {key} has {len(shown)} steps of {len(wanted)}; step {missing[0]} is missing"
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


def wanted_metrics(desired: DesiredRun) -> dict[str, dict[int, float]]:
    """Return MLflow's name of each metric -> step -> value; of a step done twice, the first value."""
    wanted: dict[str, dict[int, float]] = {}
    values = first_values(desired.attempts) if desired.attempts else {}
    if not desired.has_system_metrics:
        values = {name: steps for name, steps in values.items() if not name.startswith(SYSTEM)}
    summary = {name: {0: value} for name, value in desired.summary.items()}
    for name, steps in (*values.items(), *summary.items()):
        key = metric_key(name)
        wanted[key] = {**steps, **wanted.get(key, {})}
    return wanted


def same(recorded: float, shown: float) -> bool:
    """Return whether MLflow shows the value; not every database keeps nan and inf, or the last bit."""
    if not math.isfinite(recorded):
        return math.isnan(recorded) or abs(shown) > _LARGEST
    return math.isclose(recorded, shown, rel_tol=1e-12, abs_tol=1e-300)
