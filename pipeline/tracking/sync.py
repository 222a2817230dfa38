"""Makes MLflow agree with the files of a run: the files decide, MLflow follows.

Every step can be repeated: what a kill or an outage keeps from MLflow is sent later, once. Called by the
tracking thread. MLflow is imported inside functions only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.site import Site
from pipeline.results.runs import ENDED, PIPELINE, RunFile, Runs
from pipeline.tracking.artifact_roots import artifact_root, correct_moved_roots, lost_root
from pipeline.tracking.client import (
    active_experiment,
    active_run,
    error_line,
    mlflow_client,
    sqlite_lock,
    tagged_run,
)
from pipeline.tracking.desired import REGISTERED_STAGE, DesiredRun, desired_pipeline_run, desired_stage_run
from pipeline.tracking.fields import FieldSender, MetricProgress
from pipeline.tracking.outputs import OutputSender
from pipeline.tracking.sent import STATE_FILE, SentRun, SentState, SentSteps, StepSet
from vico.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run


MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""The tag by which MLflow's pages open in model training, not in GenAI."""


class RunSync:
    """Keeps the MLflow runs of one pipeline run up to date: the parent, and one child per stage.

    All calls must come from one thread.
    """

    def __init__(self, site: Site, runs: Runs, run_folder: Path, state: SentState):
        self.site, self.runs, self.run_folder, self.state = site, runs, run_folder, state
        self.client = mlflow_client(site.tracking_uri)
        correct_moved_roots(site)
        self._experiment = ""
        self._lost_root: str | None = None
        """The line that says why the experiment takes no files."""
        self._progress: dict[str, MetricProgress] = {}
        """By stage. Without an entry, MLflow is first asked what it has of the stage."""
        self._settled: dict[str, dict[str, Any]] = {}
        """Ended stages that were sent, with their entry in run.json."""
        self._saved = ""

    def sync(self) -> str | None:
        """Make MLflow agree with the files as they are now; return the first problem as a line."""
        run = self.runs.named(self.run_folder.name)
        self._open_experiment(run.experiment)  # one call to a dead server instead of one per stage
        problems: list[str] = []
        is_sent = False
        try:
            desired = desired_pipeline_run(run, self.site)
            parent_id = self._sent_run(desired, None).id
            problems = self._sync_stages(run, parent_id)
            self._send(desired, None)
            self._link_models(desired)
            is_sent = not problems
        except Exception:
            self._progress.pop(PIPELINE, None)
            raise
        finally:
            self.state.complete = run.state in ENDED and is_sent
            self._save()
        return problems[0] if problems else None

    def _sync_stages(self, run: RunFile, parent_id: str) -> list[str]:
        """Send all stages that changed; return one line per stage that failed."""
        problems = []
        for name, entry in run.stages.items():
            content = {**entry.model_dump(), "accepted": run.accepted}
            if self._settled.get(name) == content:
                continue
            try:
                desired = desired_stage_run(run, name, self.site)
                if desired is not None:
                    self._send(desired, parent_id)
                if desired is not None and desired.is_ended:
                    self._settled[name] = content
            except Exception as error:  # of a server, a database or the store
                self._progress.pop(name, None)
                problems.append(f"{name}: {error_line(error)}")
        return problems

    def _send(self, desired: DesiredRun, parent_id: str | None) -> None:
        """Send what is new. The status comes before models and files, whose store may be unreachable."""
        sent = self._sent_run(desired, parent_id)
        fields = FieldSender(self.client, desired, sent, self._progress[desired.name])
        outputs = OutputSender(self.client, self.site.tracking_uri, self._experiment, desired, sent)
        fields.send_params()
        fields.send_tags(parent_id)
        fields.send_metrics(self._save)
        outputs.send_datasets()
        fields.send_status()
        outputs.send_models()
        if self._lost_root is not None:
            raise UserError(self._lost_root)
        outputs.send_files()
        outputs.send_versions()

    def _link_models(self, parent: DesiredRun) -> None:
        """Show the exported model in the run of the pipeline."""
        exported = self.state.runs.get(REGISTERED_STAGE)
        if exported is not None:
            sent = self.state.runs[PIPELINE]
            outputs = OutputSender(self.client, self.site.tracking_uri, self._experiment, parent, sent)
            outputs.link_models(exported.models)

    def _sent_run(self, desired: DesiredRun, parent_id: str | None) -> SentRun:
        """Return the note of an MLflow run. The first time, find or create the run and ask what it has."""
        name, sent = desired.name, self.state.runs.get(desired.name)
        if sent is not None and sent.began != desired.began:
            self._supersede(name, sent)
            sent = None
        if sent is None or name not in self._progress:
            run = self._existing_run(desired, sent) or self._created_run(desired, parent_id)
            note = sent if sent is not None and sent.id == run.info.run_id else None
            self.state.runs[name] = sent = self._reconciled(desired, run, note)
            self._save()
        return sent

    def _existing_run(self, desired: DesiredRun, sent: SentRun | None) -> Run | None:
        """Return the MLflow run by its id, or by its tags if a kill came between creating it and our note."""
        run = active_run(self.client, sent.id) if sent is not None else None
        return run or tagged_run(self.client, self._experiment, desired.identity_tags)

    def _created_run(self, desired: DesiredRun, parent_id: str | None) -> Run:
        tags = desired.identity_tags
        if parent_id is not None:
            tags["mlflow.parentRunId"] = parent_id
        start_ms = int(desired.start_s * 1000)
        return self.client.create_run(self._experiment, start_ms, tags, run_name=desired.title)

    def _reconciled(self, desired: DesiredRun, run: Run, note: SentRun | None) -> SentRun:
        """Return what the MLflow run has: by its own answer, models and files by our `note`."""
        run_id = run.info.run_id
        last, steps = {}, {}
        for key in run.data.metrics:  # one at a time: the history of a long run is large
            logged_steps = [metric.step for metric in self.client.get_metric_history(run_id, key)]
            if logged_steps:  # a database keeps the latest value separately, even if all steps were deleted
                steps[key], last[key] = StepSet(logged_steps), max(logged_steps)
        datasets = [logged.dataset for logged in run.inputs.dataset_inputs] if run.inputs else []
        sent = SentRun(
            id=run_id,
            began=desired.began,
            status=run.info.status,
            params=list(run.data.params),
            tags=dict(run.data.tags),
            steps=last,
            datasets=[f"{dataset.name}:{dataset.digest}" for dataset in datasets],
            models=note.models if note else {},
            files=note.files if note else {},
            versions=note.versions if note else {},
            candidate=note.candidate if note else "",
        )
        self._progress[desired.name] = MetricProgress(SentSteps(sent.steps, steps))
        self._settled.pop(desired.name, None)
        return sent

    def _supersede(self, name: str, sent: SentRun) -> None:
        """End the MLflow run of a stage that was started from scratch: it does not show the stage's
        result."""
        if active_run(self.client, sent.id) is not None:
            self.client.set_tag(sent.id, "vico.superseded", "true")
            self.client.set_terminated(sent.id, "KILLED")
        self.state.superseded.append(sent.id)
        del self.state.runs[name]

    def _open_experiment(self, name: str) -> None:
        """Find the experiment, or create it if it does not exist; raise UserError if it was deleted."""
        existing = active_experiment(self.client, name, self.site)
        if existing is None or (
            existing.experiment_id != self._experiment and MODEL_TRAINING.keys() - existing.tags.keys()
        ):
            existing = self._tagged_experiment(name)
        if existing.experiment_id != self._experiment:
            self._experiment = existing.experiment_id
            self._progress, self._settled = {}, {}
        self._lost_root = lost_root(self.site, name, existing.artifact_location)

    def _tagged_experiment(self, name: str) -> Experiment:
        """Return the experiment with its tags. Of two runs that add one row at once, SQLite refuses one."""
        with sqlite_lock(self.site.tracking_uri):
            experiment = active_experiment(self.client, name, self.site) or self._created_experiment(name)
            for key in MODEL_TRAINING.keys() - experiment.tags.keys():
                self.client.set_experiment_tag(experiment.experiment_id, key, MODEL_TRAINING[key])
        return experiment

    def _created_experiment(self, name: str) -> Experiment:
        location = artifact_root(self.site, name)
        return self.client.get_experiment(self.client.create_experiment(name, artifact_location=location))

    def _save(self) -> None:
        content = self.state.model_dump_json()
        if content != self._saved:
            self.state.write(self.run_folder / STATE_FILE)
            self._saved = content
