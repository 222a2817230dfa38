"""The tasks of a pipeline: each stage with its config, inputs and fingerprint."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.records.sets import picture_roots
from pipeline.config.graph import SOURCES, Graph, StageSpec
from pipeline.config.pipeline_file import PipelineConfig
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.fingerprints import stage_fingerprint, stage_identity
from pipeline.identity.input_digests import source_fingerprint
from pipeline.identity.remembered_digests import UnreadInputs
from pipeline.results.runs import pipeline_digest
from pipeline.results.stage_folder import StageFolder
from stages.adopted import AdoptedConfig, adopted_files, files_digest
from stages.stage_config import StageConfig
from vico.errors import Faults


@dataclass(frozen=True)
class StageTask:
    """One stage of a pipeline with everything that decides its result."""

    spec: StageSpec
    config: StageConfig
    inputs: Mapping[str, str]
    """Input name -> fingerprint. An input that the pipeline does not have is left out."""
    adopted_from: Path | None = None
    """The folder with the result, if it was made elsewhere."""
    picture_roots: tuple[str, ...] = ()
    """The folders whose pictures it reads; they are in no fingerprint."""

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def identity(self) -> dict[str, Any]:
        return stage_identity(self.spec.code_version, self.config, self.inputs)

    @cached_property
    def fingerprint(self) -> str:
        return stage_fingerprint(self.name, self.identity)

    def folder(self, storage: Path) -> StageFolder:
        return StageFolder(storage, self.name, self.fingerprint)


@dataclass(frozen=True)
class Pipeline:
    """A config with the fingerprints of its sources and its tasks in order."""

    config: PipelineConfig
    sources: Mapping[str, str]
    tasks: tuple[StageTask, ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {task.name: task.fingerprint for task in self.tasks}

    @property
    def digest(self) -> str:
        return pipeline_digest(self.fingerprints)


def resolve(
    graph: Graph, config: PipelineConfig, cache: DigestCache, faults: Faults | None = None
) -> Pipeline:
    """Return the pipeline with every stage's fingerprint. Reads input files whose digests are not cached.

    Raises UserError for inputs that are missing or malformed, all together and with the earlier `faults`.
    """
    faults = faults or Faults()
    sources = _source_fingerprints(graph, config, cache, faults)
    fingerprints = dict(sources)
    tasks = []
    for spec in graph.stages:
        inputs = {name: fingerprints[name] for name in spec.inputs if name in fingerprints}
        roots = picture_roots(config.inputs.records) if "records" in spec.inputs else ()
        task = StageTask(spec, config.stage(spec.name), inputs, picture_roots=roots)
        if spec.name in config.inputs.adopt:
            task = _adopting_task(spec.name, config.inputs.adopt[spec.name], cache)
        fingerprints[spec.name] = task.fingerprint
        tasks.append(task)
    return Pipeline(config, sources, tuple(tasks))


def _adopting_task(stage: str, folder: Path, cache: DigestCache) -> StageTask:
    """Return the task that copies a result made elsewhere; it reads no input of the pipeline."""
    digest = files_digest(adopted_files(stage, folder), cache.sha256)
    return StageTask(StageSpec(stage, "stages.adopted"), AdoptedConfig(digest=digest), {}, folder)


def _source_fingerprints(
    graph: Graph, config: PipelineConfig, cache: DigestCache, faults: Faults
) -> dict[str, str]:
    """Return source -> fingerprint, without those that the pipeline file leaves out; raise `faults`."""
    needed = [name for name in SOURCES if name in graph.sources()]
    for name in needed:  # all are checked before the first is read, which may take minutes
        with faults.collected():
            source_fingerprint(name, config.inputs, UnreadInputs(cache.path.parent))
    faults.raise_all()
    fingerprints = {name: source_fingerprint(name, config.inputs, cache) for name in needed}
    return {name: value for name, value in fingerprints.items() if value is not None}
