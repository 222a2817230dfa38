"""Which stages would run, and why: every stage's identity, how it stands in the store, and what changed.

Used by `vico plan` and the runner. Reads only, and imports nothing heavy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_prep.records import records_fingerprint
from pipeline.config import Inputs, PipelineConfig
from pipeline.digests import DigestCache, model_fingerprint, repaired_fingerprint, tokenizer_fingerprint
from pipeline.graph import SOURCES, Graph, StageSpec
from pipeline.identity import stage_fingerprint, stage_identity
from pipeline.reasons import (
    changed_sources,
    changes,
    code_changes,
    mixed_code,
    shortened,
    sources_of_parts,
)
from pipeline.runs import pipeline_digest
from pipeline.store import NO_DAMAGE, Damage, Record, StageFolder
from stages.adopted import AdoptedConfig, adopted_files, files_digest
from stages.stage_config import StageConfig
from vico.errors import UserError


@dataclass(frozen=True)
class StageTask:
    """One stage of a pipeline with all that decides its result."""

    spec: StageSpec
    config: StageConfig
    inputs: Mapping[str, str]
    """Fingerprints by input name; an input the pipeline does not have is left out."""
    adopted_from: Path | None = None
    """The folder with the result, where it was made elsewhere."""

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
    """A config whose stages have their identities."""

    config: PipelineConfig
    sources: Mapping[str, str]
    tasks: tuple[StageTask, ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {task.name: task.fingerprint for task in self.tasks}

    @property
    def digest(self) -> str:
        return pipeline_digest(self.fingerprints)


def resolve(graph: Graph, config: PipelineConfig, cache: DigestCache) -> Pipeline:
    """The pipeline with every stage's fingerprint; reads the input files that the cache does not know.

    Raises UserError for inputs that are missing or malformed.
    """
    known = _source_fingerprints(graph, config, cache)
    sources = dict(known)
    tasks = []
    for spec in graph.stages:
        inputs = {name: known[name] for name in spec.inputs if name in known}
        task = StageTask(spec, config.stage(spec.name), inputs)
        if spec.name in config.inputs.adopt:
            task = _adopting_task(spec.name, config.inputs.adopt[spec.name], cache)
        known[spec.name] = task.fingerprint
        tasks.append(task)
    return Pipeline(config, sources, tuple(tasks))


def _adopting_task(stage: str, folder: Path, cache: DigestCache) -> StageTask:
    """The task that takes over a stage's result from elsewhere; it has no inputs of the pipeline's."""
    found = files_digest(adopted_files(stage, folder), cache.sha256)
    return StageTask(StageSpec(stage, "stages.adopted"), AdoptedConfig(digest=found), {}, folder)


def _source_fingerprints(graph: Graph, config: PipelineConfig, cache: DigestCache) -> dict[str, str]:
    needed = graph.sources()
    found = {name: source_fingerprint(name, config.inputs, cache) for name in SOURCES if name in needed}
    return {name: value for name, value in found.items() if value is not None}


def source_fingerprint(name: str, inputs: Inputs, cache: DigestCache) -> str | None:
    """The digest of one input from outside the pipeline, None for one that it does not have."""
    if name == "records":
        return records_fingerprint(inputs.records, cache.sha256)
    if name == "heldout":
        return None if inputs.heldout is None else records_fingerprint(inputs.heldout, cache.sha256)
    if name == "repaired":
        return repaired_fingerprint(inputs.repaired, cache)
    if name == "tokenizer":
        return tokenizer_fingerprint(inputs.model_folder, cache)
    return model_fingerprint(inputs.model_folder, cache)


@dataclass(frozen=True)
class Standing:
    """How a stage stands in the store.

    reuse: done. new: nothing is there. resume: parts are there. rebuild: done once, but outputs are missing
    or damaged. afresh: what is there was made from other bytes or nobody knows from what, and is set aside.
    unknown: done once, but what it was made from is made again first.
    """

    way: Literal["reuse", "new", "resume", "rebuild", "afresh", "unknown"]
    record: Record | None = None
    reason: str = ""
    damage: Damage = NO_DAMAGE
    expected: tuple[str, ...] = ()


def standing(folder: StageFolder, inputs: Mapping[str, str | None]) -> Standing:
    """How the stage stands, given digests of its inputs as they are now (None: not known before they are
    made).

    Raises UserError when a file of the store is damaged so that only the user can decide.
    """
    record = folder.record()
    if record is None:
        return _unfinished(folder, inputs)
    folder.refuse_edited(record)
    if None in inputs.values():
        made_first = ", ".join(name for name, value in inputs.items() if value is None)
        return Standing(
            "unknown", record, f"runs after {made_first}, unless the bytes from there stay the same"
        )
    changed = _changed_inputs(record.inputs, inputs)
    if changed:
        return Standing("afresh", record, f"input bytes changed: {changed}")
    damage = folder.damage(record)
    if damage:
        names = (*damage.missing, *damage.resized)
        return Standing("rebuild", record, f"{damage}; made again", damage, names)
    return Standing("reuse", record, f"done in run {record.run}")


def task_standing(
    task: StageTask, storage: Path, inputs: Mapping[str, str | None], *, strict_code: bool
) -> Standing:
    """How a stage of a pipeline stands; with `strict_code`, other source files are a reason to start afresh
    even though its fingerprint holds. Without it a stage goes on from parts of other code, which is said."""
    folder = task.folder(storage)
    found = standing(folder, inputs)
    if found.way == "resume":
        changed = _changed_since_attempts(task, folder)
        said = f"{found.reason}; {changed} changed since, and its parts stay"
        found = replace(found, reason=said) if changed else found
    else:
        changed = changed_sources(task, found.record.sources) if found.way == "reuse" else ""
    mixed = mixed_code(found.record) if found.way == "reuse" else ""
    if strict_code and (changed or mixed):
        why = f"{changed} changed since" if changed else mixed
        return Standing("afresh", found.record, f"{why} (--strict-code)")
    return found


def _changed_since_attempts(task: StageTask, folder: StageFolder) -> str:
    """The source files that are not those of an earlier attempt whose parts would be gone on with."""
    noted = (changed_sources(task, file.sources) for file in sources_of_parts(folder))
    return next(filter(None, noted), "")


def _unfinished(folder: StageFolder, inputs: Mapping[str, str | None]) -> Standing:
    last = folder.last_attempt_file()
    if last is None:
        if not folder.has_output():
            return Standing("new")
        return Standing("afresh", reason=f"{folder.output} has no attempt that made it; set aside")
    known = {name: value for name, value in inputs.items() if value is not None}
    changed = _changed_inputs({name: last.inputs.get(name, "nothing") for name in known}, known)
    if changed and folder.has_output():
        return Standing("afresh", reason=f"unfinished, and input bytes changed: {changed}")
    return Standing(
        "resume", reason=f"unfinished: goes on from attempt {last.attempt}", expected=tuple(last.expected)
    )


def _changed_inputs(old: Mapping[str, str], new: Mapping[str, str | None]) -> str:
    return ", ".join(
        f"{name} {shortened(old.get(name))} -> {shortened(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


@dataclass(frozen=True)
class PlannedStage:
    """A stage of `vico plan`."""

    stage: str
    action: Literal["reuse", "run"]
    fingerprint: str
    reasons: list[str]
    refused: str | None = field(default=None)
    """Why the stage cannot run before the user has decided something."""

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "action": self.action,
            "fingerprint": self.fingerprint,
            "reasons": self.reasons,
        }


def plan(
    pipeline: Pipeline, storage: Path, forced: Iterable[str] = (), *, strict_code: bool = False
) -> list[PlannedStage]:
    """Every stage in order with its action and the reasons; `forced` are the stages to run in any case."""
    forced = set(forced)
    outputs: dict[str, str | None] = dict(pipeline.sources)
    planned = []
    for task in pipeline.tasks:
        inputs = {name: outputs[name] for name in task.inputs}
        one, outputs[task.name] = _planned(task, storage, inputs, task.name in forced, strict_code)
        planned.append(one)
    return planned


def _planned(
    task: StageTask, storage: Path, inputs: Mapping[str, str | None], forced: bool, strict_code: bool
) -> tuple[PlannedStage, str | None]:
    """The stage's plan and the digest of its output, None if that is not known yet."""
    if forced:
        return PlannedStage(task.name, "run", task.fingerprint, ["--force"]), None
    try:
        found = task_standing(task, storage, inputs, strict_code=strict_code)
    except UserError as error:
        return PlannedStage(task.name, "run", task.fingerprint, [str(error)], refused=str(error)), None
    if found.way == "reuse" and found.record is not None:
        reasons = [found.reason, *code_changes(task, found.record)]
        return PlannedStage(task.name, "reuse", task.fingerprint, reasons), found.record.output_digest
    reasons = [found.reason] if found.reason else changes(task, storage)
    if task.adopted_from is not None:
        reasons = [f"adopted from {task.adopted_from}, digest {task.config.digest[:12]}", *reasons]
    return PlannedStage(task.name, "run", task.fingerprint, reasons), None
