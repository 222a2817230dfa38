"""Data sets, models and files that MLflow should show of a stage, read from its record and output."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.site import Site
from data_prep.shards.names import MANIFEST_FILE
from pipeline.config.graph import MODEL_SOURCES
from pipeline.identity.fingerprints import digest
from pipeline.results.records import Record
from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import StageFolder
from stages.outputs import FIGURES_FOLDER

TABLE_BYTES = 1_000_000
"""Larger JSON files of an output are not copied to MLflow."""


@dataclass(frozen=True)
class DataSet:
    """A data set that a stage read (`context` "input") or made ("output")."""

    name: str
    digest: str
    source: Mapping[str, Any]
    """What is known of its origin, as JSON."""
    context: str
    profile: Mapping[str, float] = field(default_factory=dict)
    """Counts of it."""


@dataclass(frozen=True)
class ModelOutput:
    """A model that a stage made: the address of its files and their digest."""

    name: str
    uri: str
    digest: str

    @property
    def key(self) -> str:
        """Return name and digest, which identify the model in mlflow.json."""
        return f"{self.name}:{self.digest}"


def stage_datasets(run: RunFile, inputs: Mapping[str, str], site: Site) -> Iterator[DataSet]:
    """Yield the data sets that a stage read; `inputs` is name -> digest. Models are not data sets."""
    for name, input_digest in inputs.items():
        if name in run.stages:
            address = output_address(site, name, run.stages[name].fingerprint)
            yield DataSet(name, input_digest, {"digest": input_digest, "path": address}, "input")
        elif name not in MODEL_SOURCES:
            config = (run.config.get("inputs") or {}).get(name) or {}
            yield DataSet(name, input_digest, {"digest": input_digest, "records": config}, "input")


def made_dataset(record: Record, site: Site) -> DataSet | None:
    """Return the data set that a stage made; None if it made none."""
    manifest = record.outputs.get(MANIFEST_FILE)
    if manifest is None:
        return None
    address = output_address(site, record.stage, record.fingerprint)
    source = {"digest": manifest.sha256, "path": address}
    return DataSet(record.stage, manifest.sha256, source, "output", numbers(record.counts))


def made_models(folder: StageFolder, record: Record) -> Iterator[ModelOutput]:
    """Yield one model per folder with weights in the output, and one per weight file outside a folder."""
    weights = [name for name in record.outputs if name.endswith(".safetensors")]
    for path in sorted({name.rpartition("/")[0] or name for name in weights}):
        files = {
            name: file.sha256 for name, file in record.outputs.items() if f"{name}/".startswith(f"{path}/")
        }
        name = f"{record.stage}-{_model_name(path.removesuffix('.safetensors'))}"
        address = folder.storage.address(folder.output / path)
        uri = address if "://" in address else Path(address).as_uri()
        yield ModelOutput(name, uri, digest(files))


def artifact_files(folder: StageFolder) -> Iterator[tuple[Path, str]]:
    """Yield figures and small tables of the output, each with its artifact folder in MLflow."""
    for path in sorted(folder.output.glob(f"{FIGURES_FOLDER}/*.png")):
        if not path.name.startswith("."):
            yield path, FIGURES_FOLDER
    for path in sorted([*folder.output.glob("*.json"), *folder.output.glob("*.md")]):
        if not path.name.startswith(".") and path.stat().st_size <= TABLE_BYTES:
            yield path, "tables"


def output_address(site: Site, stage: str, fingerprint: str) -> str:
    """Return the address of a stage's output in the storage."""
    folder = StageFolder(site.storage, stage, fingerprint)
    return folder.storage.address(folder.output)


def numbers(counts: Mapping[str, Any]) -> dict[str, float]:
    """Return the counts that are numbers."""
    return {name: float(value) for name, value in counts.items() if isinstance(value, int | float)}


def _model_name(path: str) -> str:
    """Replace the characters that MLflow does not allow in names of models."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in path)
