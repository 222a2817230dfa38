"""MLflow as a projection of the store: a run is what its files say, and MLflow is made to agree with them.

All of it can be done again: what a kill or an outage keeps from MLflow is sent later, once. Called by the
tracker's thread. MLflow takes 4 to 6 seconds to import, so it is imported inside functions only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.results.metric_lines import MetricFiles
from pipeline.results.runs import ENDED, Runs
from pipeline.storage.lookup import storage_of
from pipeline.tracking.client import chunks, metric_key, mlflow_client, one_line, sqlite_lock
from pipeline.tracking.desired import Projection, of_pipeline, of_stage
from pipeline.tracking.outputs import Made
from pipeline.tracking.sent import STATE_FILE, SentRun, SentState, SentSteps, StepSet

# Limits of MLflow: metrics of a batch, params or tags of a batch, characters.
NUM_METRICS, NUM_PARAMS, PARAM_LENGTH, TAG_LENGTH = 1000, 100, 6000, 5000


class MlflowRuns:
    """The MLflow runs of one run of the pipeline: its own, and a child for each stage. For one thread."""

    def __init__(self, site: Site, runs: Runs, run_folder: Path, state: SentState):
        self.site, self.runs, self.run_folder, self.state = site, runs, run_folder, state
        self.client = mlflow_client(site.tracking_uri)
        self.experiment_id = ""
        self._steps: dict[str, SentSteps] = {}
        self._metrics: dict[str, MetricFiles] = {}
        self._settled: dict[str, Any] = {}
        self._has_failed = False
        self._saved = ""

    def sync(self) -> str | None:
        """Make MLflow agree with the files as they are now; the first thing that it could not be told."""
        run = self.runs.named(self.run_folder.name)
        self.experiment_id = self.experiment_id or self._experiment(run.experiment)
        if self._has_failed:
            self.client.get_experiment(
                self.experiment_id
            )  # one call to a dead server and not one for each stage
        problems, is_told = [], False
        try:
            parent = of_pipeline(run, self.site)
            parent_id = self._sent(parent, None).id
            for name, entry in run.stages.items():
                if self._settled.get(name) == entry.model_dump():
                    continue
                try:
                    projection = of_stage(run, name, self.site)
                    if projection is not None:
                        self._tell(projection, parent_id)
                    if projection is not None and projection.is_ended:
                        self._settled[name] = entry.model_dump()
                except Exception as error:
                    self._steps.pop(name, None)  # before more is sent, MLflow is asked what it has
                    problems.append(f"{name}: {one_line(error)}")
            self._tell(parent, None)
            is_told = not problems
        finally:
            self._has_failed = True
            self.state.complete = run.state in ENDED and is_told
            self._save()
        self._has_failed = bool(problems)
        return problems[0] if problems else None

    def _tell(self, projection: Projection, parent_id: str | None) -> None:
        """Send what is new; the status before models and files, whose place may be out of reach by itself."""
        sent = self._sent(projection, parent_id)
        self._tell_params(projection, sent)
        self._tell_tags(projection, sent, parent_id)
        self._tell_metrics(projection, sent)
        made = Made(self.client, self.site.tracking_uri, self.experiment_id, projection, sent)
        made.tell_datasets()
        self._tell_status(projection, sent)
        made.tell_models(self._identity(projection))
        made.tell_files()
        made.tell_versions()

    def _sent(self, projection: Projection, parent_id: str | None) -> SentRun:
        """The MLflow run of the projection: found or made, and, the first time, asked for what it has."""
        name, sent = projection.name, self.state.runs.get(projection.name)
        if sent is not None and sent.began != projection.began:
            self._supersede(name, sent)
            sent = None
        if sent is None or name not in self._steps:
            run = self._found(projection, sent) or self._created(projection, parent_id)
            known = sent if sent is not None and sent.id == run.info.run_id else None
            self.state.runs[name] = sent = self._reconciled(name, run, projection.began, known)
            self._save()
        return sent

    def _found(self, projection: Projection, sent: SentRun | None) -> Any:
        """The MLflow run by its id, or by its tags when a kill came between its making and our note of it."""
        run = self._by_id(sent.id) if sent is not None else None
        if run is not None:
            return run
        filters = [f"tags.`{name}` = '{value}'" for name, value in self._identity(projection).items()]
        found = self.client.search_runs([self.experiment_id], " and ".join(filters), max_results=1)
        return found[0] if found else None

    def _by_id(self, run_id: str) -> Any:
        """The MLflow run; None when somebody deleted it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _created(self, projection: Projection, parent_id: str | None) -> Any:
        tags = self._identity(projection)
        if parent_id is not None:
            tags["mlflow.parentRunId"] = parent_id
        start_ms = int(projection.start_s * 1000)
        return self.client.create_run(self.experiment_id, start_ms, tags, run_name=projection.title)

    def _identity(self, projection: Projection) -> dict[str, str]:
        run = self.run_folder.name
        return {"vico.run": run, "vico.stage": projection.name, "vico.began": projection.began}

    def _reconciled(self, name: str, run: Any, began: str, known: SentRun | None) -> SentRun:
        """What MLflow has of this run by its own word; of models and files by our note."""
        run_id = run.info.run_id
        last, steps = {}, {}
        for key in run.data.metrics:  # one by one: the history of a long run is large
            found = [metric.step for metric in self.client.get_metric_history(run_id, key)]
            if found:  # a database keeps the latest value by itself, also where all steps were deleted
                steps[key], last[key] = StepSet(found), max(found)
        datasets = [one.dataset for one in run.inputs.dataset_inputs] if run.inputs else []
        sent = SentRun(
            id=run_id,
            began=began,
            status=run.info.status,
            params=list(run.data.params),
            tags=dict(run.data.tags),
            steps=last,
            datasets=[f"{dataset.name}:{dataset.digest}" for dataset in datasets],
            models=known.models if known else {},
            files=known.files if known else {},
            versions=known.versions if known else {},
        )
        self._steps[name] = SentSteps(sent.steps, steps)
        self._metrics.pop(name, None)
        self._settled.pop(name, None)
        return sent

    def _supersede(self, name: str, sent: SentRun) -> None:
        """The stage was begun afresh: what was sent of it is not its result."""
        if self._by_id(sent.id) is not None:
            self.client.set_tag(sent.id, "vico.superseded", "true")
            self.client.set_terminated(sent.id, "KILLED")
        self.state.superseded.append(sent.id)
        del self.state.runs[name]

    def _tell_params(self, projection: Projection, sent: SentRun) -> None:
        from mlflow.entities import Param

        new = [(key, value) for key, value in projection.params.items() if key not in sent.params]
        for chunk in chunks(new, NUM_PARAMS):
            params = [Param(key, value[:PARAM_LENGTH]) for key, value in chunk]
            self.client.log_batch(sent.id, params=params, synchronous=True)
            sent.params.extend(key for key, _ in chunk)

    def _tell_tags(self, projection: Projection, sent: SentRun, parent_id: str | None) -> None:
        from mlflow.entities import RunTag

        wanted = {key: value[:TAG_LENGTH] for key, value in projection.tags.items() if value}
        wanted |= self._identity(projection)
        if parent_id is not None:
            wanted["mlflow.parentRunId"] = parent_id
        new = [(key, value) for key, value in wanted.items() if sent.tags.get(key) != value]
        for chunk in chunks(new, NUM_PARAMS):
            tags = [RunTag(key, value) for key, value in chunk]
            self.client.log_batch(sent.id, tags=tags, synchronous=True)
            sent.tags.update(chunk)
        for key in [key for key in sent.tags if key.startswith("vico.") and key not in wanted]:
            self.client.delete_tag(sent.id, key)  # such as the error of a run that has gone on since
            del sent.tags[key]

    def _tell_metrics(self, projection: Projection, sent: SentRun) -> None:
        """Send every step of every metric that MLflow does not have; of a step done twice, the first.

        Only what the storage has is sent: a line that dies with this machine must not stand in MLflow, where
        the machine that goes on would find its steps taken.
        """
        steps = self._steps[projection.name]
        if projection.attempts is not None:
            files = self._metrics.get(projection.name)
            if files is None:
                shared_bytes = storage_of(projection.attempts).shared_bytes
                files = self._metrics[projection.name] = MetricFiles(projection.attempts, shared_bytes)
            while lines := files.unread(NUM_METRICS):
                values = [
                    (key, line.step, value, line.time_s)
                    for line in lines
                    for key, value in line.metrics.items()
                ]
                self._tell_values(sent, steps, values)
                files.take(lines)
                self._save()  # after an outage there may be minutes of them
        end_s = projection.end_s or projection.start_s
        counts = [(f"summary/{key}", 0, value, end_s) for key, value in projection.counts.items()]
        self._tell_values(sent, steps, counts)

    def _tell_values(
        self, sent: SentRun, steps: SentSteps, values: Sequence[tuple[str, int, float, float]]
    ) -> None:
        """Send (name, step, value, time) where MLflow has no such step."""
        from mlflow.entities import Metric

        new = {}
        for name, step, value, time_s in values:
            key = metric_key(name)
            if steps.is_new(key, step):
                new.setdefault((key, step), Metric(key, value, int(time_s * 1000), step))
        for chunk in chunks(list(new.values()), NUM_METRICS):
            self.client.log_batch(sent.id, metrics=chunk, synchronous=True)
            for metric in chunk:
                steps.add(metric.key, metric.step)

    def _tell_status(self, projection: Projection, sent: SentRun) -> None:
        if sent.status == projection.status:
            return
        if projection.is_ended:
            end_ms = int(projection.end_s * 1000) if projection.end_s else None
            self.client.set_terminated(sent.id, projection.status, end_ms)
        else:
            self.client.update_run(sent.id, status=projection.status)
        sent.status = projection.status

    def _experiment(self, name: str) -> str:
        """The id of the experiment, made if need be; with sqlite its artifacts lie beside the database."""
        uri, artifacts = self.site.tracking_uri, self.site.tracking.artifacts
        with sqlite_lock(uri):
            found = self.client.get_experiment_by_name(name)
            if found is not None:
                return found.experiment_id
            if artifacts is None and uri.startswith("sqlite:"):
                # What lies in the working copy of an object store is not there on another machine.
                beside = Path(uri.removeprefix("sqlite:///")).parent
                folder = beside if self.site.remote else self.site.storage
                artifacts = (folder.resolve() / "mlartifacts").as_uri()
            plain = re.sub(r"[^\w.-]", "_", name)
            place = f"{artifacts.rstrip('/')}/{plain}" if artifacts else None
            return self.client.create_experiment(name, artifact_location=place)

    def _save(self) -> None:
        content = self.state.model_dump_json()
        if content != self._saved:
            self.state.write(self.run_folder / STATE_FILE)
            self._saved = content
