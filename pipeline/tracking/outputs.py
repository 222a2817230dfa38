"""Data sets, models, registered versions and artifacts of one MLflow run, sent as far as MLflow does not have
them yet. MLflow is imported inside functions only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.site import Site
from pipeline.results.runs import PIPELINE, RunFile, Runs
from pipeline.tracking.artifact_roots import lost_root, moved_roots
from pipeline.tracking.client import active_experiment, error_line, mlflow_client, sqlite_lock, tag_filter
from pipeline.tracking.desired import DesiredRun
from pipeline.tracking.desired_outputs import ModelOutput
from pipeline.tracking.front_page import version_description
from pipeline.tracking.sent import SentRun, SentState
from vico.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST_LENGTH = 36
"""MLflow's limit for digests of data sets."""
CANDIDATE = "candidate"
"""The alias of the newest registered version that passed its quality gate or was accepted."""

_VERSIONS = "mlflow.modelVersions"


@dataclass(frozen=True)
class OutputSender:
    """Sends inputs and outputs of one MLflow run, and notes in `sent` what MLflow has then."""

    client: MlflowClient
    uri: str
    experiment: str
    """The id of the experiment."""
    desired: DesiredRun
    sent: SentRun

    def send_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        for wanted in self.desired.datasets:
            digest = wanted.digest[:DIGEST_LENGTH]
            if f"{wanted.name}:{digest}" in self.sent.datasets:
                continue
            source = json.dumps(wanted.source, sort_keys=True)
            profile = json.dumps(wanted.profile) if wanted.profile else None
            dataset = Dataset(wanted.name, digest, "vico", source, profile=profile)
            dataset_input = DatasetInput(dataset, [InputTag("mlflow.data.context", wanted.context)])
            with sqlite_lock(self.uri):
                self.client.log_inputs(self.sent.id, datasets=[dataset_input])
            self.sent.datasets.append(f"{wanted.name}:{digest}")

    def send_models(self) -> None:
        """Create one external LoggedModel per model: the address and digest of its files, not the files."""
        for model in self.desired.models:
            if model.key not in self.sent.models:
                self.sent.models[model.key] = self._send_model(model)

    def _send_model(self, model: ModelOutput) -> str:
        # A kill may have come between creating the model and our note of it.
        filters = f"source_run_id = '{self.sent.id}' and {tag_filter({'vico.digest': model.digest})}"
        logged = next(iter(self.client.search_logged_models([self.experiment], filters, max_results=1)), None)
        if logged is None:
            tags = {"mlflow.model.isExternal": "true", "vico.digest": model.digest, "vico.uri": model.uri}
            tags |= self.desired.identity_tags
            logged = self.client.create_logged_model(self.experiment, model.name, self.sent.id, tags)
        self.client.finalize_logged_model(logged.model_id, "READY")
        self._add_output(logged.model_id)
        return logged.model_id

    def link_models(self, models: Mapping[str, str]) -> None:
        """Show models of another MLflow run (key -> id) as outputs of this one, too."""
        for key, model_id in models.items():
            if self.sent.models.get(key) != model_id:
                self._add_output(model_id)
                self.sent.models[key] = model_id

    def _add_output(self, model_id: str) -> None:
        from mlflow.entities import LoggedModelOutput

        outputs = self.client.get_run(self.sent.id).outputs
        output_ids = [output.model_id for output in (outputs.model_outputs if outputs else [])]
        if model_id not in output_ids:  # MLflow refuses the same output twice
            self.client.log_outputs(self.sent.id, [LoggedModelOutput(model_id, step=0)])

    def send_files(self) -> None:
        for name, text in self.desired.texts.items():
            if name not in self.sent.files:
                self.client.log_text(self.sent.id, text, name)
                self.sent.files[name] = [len(text), 0]
        for path, folder in self.desired.files:
            file_status = path.stat()
            signature = [file_status.st_size, file_status.st_mtime_ns]
            if self.sent.files.get(f"{folder}/{path.name}") != signature:
                self.client.log_artifact(self.sent.id, str(path), folder)
                self.sent.files[f"{folder}/{path.name}"] = signature

    def send_versions(self) -> None:
        """Create a version in the model registry for each model; one that passes becomes the candidate.

        Call this last: not every server has a registry.
        """
        registered = registered_name(self.desired.registers_as)
        for model in self.desired.models if registered else ():
            version = self.sent.versions.get(model.key)
            if version is None:
                version = self._version(registered, model) or self._new_version(registered, model)
                self._show_version(registered, version, self.sent.models[model.key])
                self.sent.versions[model.key] = version
            if self.desired.is_candidate and self.sent.candidate != version:
                self.client.set_registered_model_alias(registered, CANDIDATE, version)
                self.sent.candidate = version

    def _version(self, registered: str, model: ModelOutput) -> str | None:
        """Return the version of the model if MLflow has it already: a kill may have come before our note."""
        versions = self.client.search_model_versions(f"name = '{registered}' and run_id = '{self.sent.id}'")
        matching = (version for version in versions if version.tags.get("vico.digest") == model.digest)
        return next((str(version.version) for version in matching), None)

    def _show_version(self, registered: str, version: str, model_id: str) -> None:
        """Make the pages of runs with this model show its version, those of its stage and of the pipeline.

        They read it from a tag of the model, which a server sets when it creates a version, and a database
        does not.
        """
        versions = json.loads(self.client.get_logged_model(model_id).tags.get(_VERSIONS, "[]"))
        if (registered, version) not in {(entry["name"], str(entry["version"])) for entry in versions}:
            versions.append({"name": registered, "version": version})
            self.client.set_logged_model_tags(model_id, {_VERSIONS: json.dumps(versions)})

    def _new_version(self, registered: str, model: ModelOutput) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(registered)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        names = ("vico.run", "vico.fingerprint")
        tags = {name: self.desired.tags[name] for name in names if name in self.desired.tags}
        tags |= {"vico.digest": model.digest, "vico.uri": model.uri, **self.desired.version_tags}
        model_id = self.sent.models[model.key]
        # A server accepts no path outside its artifacts; a database looks for LoggedModels elsewhere.
        is_server = self.uri.startswith(("http://", "https://"))
        source = f"models:/{model_id}" if is_server else model.uri
        version = self.client.create_model_version(
            registered,
            source,
            run_id=self.sent.id,
            tags=tags,
            description=version_description(tags) or None,
            model_id=model_id if is_server else None,
        )
        return str(version.version)


def registered_name(name: str) -> str:
    """Return the name as the registry accepts it: without slash, colon and quotes."""
    return re.sub(r"[/:'\"`]", "_", name)


def log_texts(site: Site, run: RunFile, texts: Mapping[str, str]) -> str | None:
    """Store texts (artifact path -> text) in the MLflow run of the pipeline; return the line that says why
    not.

    Returns None if they are stored, or if the run was never tracked.
    """
    folder = Runs(site.storage).run_folder(run.run)
    sent = SentState.of(folder, site).runs.get(PIPELINE)
    run_id = sent.id if sent is not None else run.mlflow_run_id
    if run_id is None:
        return None
    try:
        client = mlflow_client(site.tracking_uri)
        _refuse_wrong_root(client, run, site)
        for path, text in texts.items():
            client.log_text(run_id, text, path)
    except Exception as error:  # from a server, a database or an artifact store
        return f"the report is not in MLflow at {site.tracking_address}: {error_line(error)}"
    return None


def _refuse_wrong_root(client: MlflowClient, run: RunFile, site: Site) -> None:
    """Raise UserError if the artifacts of the run are not kept where the store is now."""
    for root in moved_roots(site):
        raise UserError(f"{root.text}; `vico audit --reap` corrects it")
    experiment = active_experiment(client, run.experiment, site)
    lost = lost_root(site, run.experiment, experiment.artifact_location) if experiment is not None else None
    if lost is not None:
        raise UserError(lost)
