"""What a stage read and made as MLflow shows it: data sets, models, registered versions, files. Called by
tracking; MLflow is imported inside functions only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.tracking.client import sqlite_lock
from pipeline.tracking.desired import ModelOutput, Projection
from pipeline.tracking.sent import SentRun

if TYPE_CHECKING:
    from mlflow import MlflowClient


DIGEST_LENGTH = 36
"""MLflow's limit for digests of data sets."""
CANDIDATE = "candidate"
"""The alias of the newest registered version."""


@dataclass(frozen=True)
class Made:
    """Inputs and outputs of one MLflow run; what `sent` knows is not told again."""

    client: MlflowClient
    uri: str
    experiment_id: str
    projection: Projection
    sent: SentRun

    def tell_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        for one in self.projection.datasets:
            digest = one.digest[:DIGEST_LENGTH]
            if f"{one.name}:{digest}" in self.sent.datasets:
                continue
            source = json.dumps(one.source, sort_keys=True)
            profile = json.dumps(one.profile) if one.profile else None
            dataset = Dataset(one.name, digest, "vico", source, profile=profile)
            given = DatasetInput(dataset, [InputTag("mlflow.data.context", one.context)])
            with sqlite_lock(self.uri):
                self.client.log_inputs(self.sent.id, datasets=[given])
            self.sent.datasets.append(f"{one.name}:{digest}")

    def tell_models(self, identity: Mapping[str, str]) -> None:
        """An external LoggedModel for each: where its files are and their digest, not the files."""
        from mlflow.entities import LoggedModelOutput

        for one in self.projection.models:
            if one.mark in self.sent.models:
                continue
            filters = f"source_run_id = '{self.sent.id}' and tags.`vico.digest` = '{one.digest}'"
            found = list(self.client.search_logged_models([self.experiment_id], filters, max_results=1))
            tags = {"mlflow.model.isExternal": "true", "vico.digest": one.digest, "vico.uri": one.uri}
            tags |= identity
            model = found[0] if found else None
            if model is None:
                model = self.client.create_logged_model(self.experiment_id, one.name, self.sent.id, tags)
            self.client.finalize_logged_model(model.model_id, "READY")
            outputs = self.client.get_run(self.sent.id).outputs
            if model.model_id not in [known.model_id for known in (outputs.model_outputs if outputs else [])]:
                self.client.log_outputs(
                    self.sent.id, [LoggedModelOutput(model.model_id, step=0)]
                )  # not twice
            self.sent.models[one.mark] = model.model_id

    def tell_files(self) -> None:
        for name, text in self.projection.texts.items():
            if name not in self.sent.files:
                self.client.log_text(self.sent.id, text, name)
                self.sent.files[name] = [len(text), 0]
        for path, folder in self.projection.files:
            facts = path.stat()
            signature = [facts.st_size, facts.st_mtime_ns]
            if self.sent.files.get(f"{folder}/{path.name}") != signature:
                self.client.log_artifact(self.sent.id, str(path), folder)
                self.sent.files[f"{folder}/{path.name}"] = signature

    def tell_versions(self) -> None:
        """A version in the model registry for each model that the stage hands out; the newest is the
        candidate. The last to be told: not every server has a registry.
        """
        title = registered_name(self.projection.registers_as)
        for one in self.projection.models if title else ():
            if one.mark in self.sent.versions:
                continue
            version = self._version(title, one) or self._new_version(title, one)
            self.client.set_registered_model_alias(title, CANDIDATE, version)
            self.sent.versions[one.mark] = version

    def _version(self, title: str, one: ModelOutput) -> str | None:
        """The version that a kill kept from our note."""
        found = self.client.search_model_versions(f"name = '{title}' and run_id = '{self.sent.id}'")
        return next((str(each.version) for each in found if each.tags.get("vico.digest") == one.digest), None)

    def _new_version(self, title: str, one: ModelOutput) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(title)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        names = ("vico.run", "vico.fingerprint")
        tags = {name: self.projection.tags[name] for name in names if name in self.projection.tags}
        tags |= {"vico.digest": one.digest, "vico.uri": one.uri}
        model_id = self.sent.models[one.mark]
        # A server takes no path outside its artifacts; a database looks for LoggedModels in another place.
        is_server = self.uri.startswith(("http://", "https://"))
        source = f"models:/{model_id}" if is_server else one.uri
        version = self.client.create_model_version(
            title, source, run_id=self.sent.id, tags=tags, model_id=model_id if is_server else None
        )
        return str(version.version)


def registered_name(name: str) -> str:
    """The name as the registry takes it: without slash, colon and quotes."""
    return re.sub(r"[/:'\"`]", "_", name)
