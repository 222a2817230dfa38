"""What MLflow should show of a run, read from run.json and the store. Used by tracking and the audit; does
not import MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.settings.yaml_files import yaml_text
from cluster.site import Site
from pipeline.config.dotted_keys import flattened_text
from pipeline.config.graph import block_of, block_path
from pipeline.identity.provenance import git_state
from pipeline.results.quality import gate_of, run_quality
from pipeline.results.records import Record
from pipeline.results.runs import PIPELINE, RunFile, StageEntry, State
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.storage_id import storage_id
from pipeline.tracking.desired_outputs import (
    DataSet,
    ModelOutput,
    artifact_files,
    made_dataset,
    made_models,
    numbers,
    output_address,
    stage_datasets,
)
from pipeline.tracking.front_page import (
    LAST,
    final_metrics,
    source_digests,
    source_tags,
    version_tags,
)
from pipeline.tracking.sent import SentState
from stages.outputs import MODEL_FOLDER
from vico.shown_text import printable, printable_lines

STATUS: dict[State, str] = {
    "pending": "KILLED",  # of a stage: a command on the run has started and has not reached the stage yet
    "running": "RUNNING",
    "done": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "cancelled": "KILLED",
}
REGISTERED_STAGE = "export"
"""The stage whose model becomes a version in the model registry."""


@dataclass(frozen=True)
class DesiredRun:
    """What one MLflow run should show: the run of the pipeline, or of one stage."""

    name: str
    began: str
    """Number of the first attempt. If the stage is started from scratch, this changes: a new MLflow run."""
    title: str
    status: str
    start_s: float
    end_s: float | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    attempts: Path | None = None
    """The folder with the metrics of the attempts; None if no metrics are to be sent."""
    has_system_metrics: bool = True
    """Whether the metrics of the nodes (`system/...`) are sent, too."""
    summary: Mapping[str, float] = field(default_factory=dict)
    """Metrics that have one value."""
    datasets: tuple[DataSet, ...] = ()
    models: tuple[ModelOutput, ...] = ()
    registers_as: str = ""
    """Name under which the models become versions in the model registry; empty: they do not."""
    is_candidate: bool = False
    """Whether the registered version gets the alias of the candidate."""
    version_tags: Mapping[str, str] = field(default_factory=dict)
    """What a registered version says of its model."""
    files: tuple[tuple[Path, str], ...] = ()
    """Files, each with its artifact folder."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Path of an artifact -> its text."""

    def __post_init__(self) -> None:
        """Escape control characters from configs and errors: MLflow refuses them or shows them raw."""
        for name in ("params", "tags"):
            shown = {printable_lines(key): printable_lines(text) for key, text in getattr(self, name).items()}
            object.__setattr__(self, name, shown)
        object.__setattr__(self, "title", printable(self.title))

    @property
    def is_ended(self) -> bool:
        return self.status != "RUNNING"

    @property
    def identity_tags(self) -> dict[str, str]:
        """Return the tags by which this MLflow run is found when its id was lost."""
        return {"vico.run": self.tags["vico.run"], "vico.stage": self.name, "vico.began": self.began}


def desired_pipeline_run(run: RunFile, site: Site) -> DesiredRun:
    """Return the parent run, which shows what belongs to the pipeline as a whole."""
    names = dict.fromkeys(("inputs", *(block_path(stage)[0] for stage in run.stages)))
    blocks = {name: run.config[name] for name in names if name in run.config}
    sources = source_digests(run, site.storage)
    tags = {
        "vico.run": run.run,
        "vico.stage": PIPELINE,
        "vico.pipeline": run.pipeline,
        "vico.state": run.state,
        "vico.site": run.site,
        "vico.storage": site.storage_address,
        "vico.storage_id": storage_id(site.storage),
        "vico.num_commands": str(len(run.attempts)),
        **source_tags(run),
        **_git_tags(git_state()),
    }
    if run.attempts:
        tags["vico.host"] = run.attempts[-1].host
    if run.error:
        tags["vico.error"] = run.error
    if run.submission:
        tags["vico.submission"] = str(run.submission.get("id"))
    ended = run.attempts[-1].ended if run.attempts else None
    return DesiredRun(
        name=PIPELINE,
        began="1",
        title=f"{run.experiment} {run.run}",
        status="RUNNING" if run.state == "pending" else STATUS[run.state],
        start_s=_seconds(run.created),
        end_s=_seconds(ended) if ended else None,
        params=flattened_text({"seed": run.config.get("seed"), **blocks}),
        tags=tags,
        summary=final_metrics(run, site.storage),
        datasets=tuple(stage_datasets(run, sources, site)),
        texts={"config.yaml": yaml_text(run.config)},
    )


def desired_stage_run(run: RunFile, name: str, site: Site) -> DesiredRun | None:
    """Return the run of a stage; None before its first attempt.

    A stage that another run made shows no metrics and outputs, only where it was reused from.
    """
    entry = run.stages[name]
    folder = StageFolder(site.storage, name, entry.fingerprint)
    began = _first_attempt(folder)
    if began is None or entry.attempt == 0:
        return None
    record = folder.record() if entry.state == "done" else None
    attempt = folder.last_attempt_file()
    inputs = record.inputs if record else attempt.inputs if attempt else {}
    is_own = not _is_of_another_run(run, entry)
    made_by_run = record if is_own else None
    dataset = made_dataset(record, site) if record else None
    return DesiredRun(
        name=name,
        began=str(began),
        title=name,
        status=STATUS[entry.state],
        start_s=_seconds(record.started if record else attempt.started if attempt else run.created),
        end_s=_seconds(record.ended) if record else None,
        params=flattened_text(block_of(run.config, name)),
        tags={
            **_entry_tags(run, name, site),
            **(_record_tags(record) if record else _driver_tags(run, site.for_stage(name))),
            **{f"vico.input.{source}": value for source, value in inputs.items()},
        },
        attempts=folder.path / "attempts" if is_own else None,
        has_system_metrics=site.tracking.system_metrics,
        summary=_summary(made_by_run) if made_by_run else {},
        datasets=(*stage_datasets(run, inputs, site), *([dataset] if dataset else [])),
        models=tuple(made_models(folder, made_by_run)) if made_by_run else (),
        registers_as=run.experiment if name == REGISTERED_STAGE else "",
        is_candidate=name == REGISTERED_STAGE and record is not None and _passes_gate(run, site),
        version_tags=_version_tags(run, made_by_run, folder, site) if made_by_run else {},
        files=tuple(artifact_files(folder)) if is_own else (),
    )


def _summary(record: Record) -> dict[str, float]:
    """Return the counts of a stage as metrics, without those that repeat the last value of a metric."""
    counts = numbers(record.counts)
    return {f"summary/{name}": value for name, value in counts.items() if not name.startswith(LAST)}


def _version_tags(run: RunFile, record: Record, folder: StageFolder, site: Site) -> dict[str, str]:
    if record.stage != REGISTERED_STAGE:
        return {}
    return version_tags(run, record, folder.storage.address(folder.output / MODEL_FOLDER), site)


def _passes_gate(run: RunFile, site: Site) -> bool:
    """Return whether the model may become the candidate; one whose quality is not known needs --accept."""
    quality = run_quality(run, site.storage)
    return run.accepted or (quality is not None and not quality.faults(gate_of(run)))


def _is_of_another_run(run: RunFile, entry: StageEntry) -> bool:
    return entry.reused and entry.reused_from != run.run


def _entry_tags(run: RunFile, name: str, site: Site) -> dict[str, str]:
    """Return the tags that run.json has of a stage."""
    entry = run.stages[name]
    tags = {
        "vico.run": run.run,
        "vico.stage": name,
        "vico.fingerprint": entry.fingerprint,
        "vico.state": entry.state,
        "vico.attempt": str(entry.attempt),
        "vico.output": output_address(site, name, entry.fingerprint),
        "vico.site": run.site,
    }
    if entry.reused_from and _is_of_another_run(run, entry):
        tags["vico.reused_from"] = entry.reused_from
        tags["vico.reused_child"] = _reused_run_id(name, entry, entry.reused_from, site)
    return tags


def _record_tags(record: Record) -> dict[str, str]:
    """Return the tags of a finished stage: of the process that made it, and of its code and output."""
    return {
        "vico.site": record.site,
        "vico.host": str(record.facts.get("host", "")),
        "vico.world_size": str(record.facts.get("resources", {}).get("workers", "")),
        "vico.code_version": str(record.identity.get("code_version", "")),
        "vico.source_digest": record.source_digest,
        "vico.output_digest": record.output_digest,
        "vico.seconds": f"{record.seconds:.3f}",
        **_git_tags(record.git),
    }


def _driver_tags(run: RunFile, site: Site) -> dict[str, str]:
    """Return the tags of an unfinished stage that depend on the process that is working on it: this one."""
    return {
        "vico.host": run.attempts[-1].host if run.attempts else "",
        "vico.world_size": str(site.resources.workers),
        **_git_tags(git_state()),
    }


def _git_tags(git: Mapping[str, Any]) -> dict[str, str]:
    if not git.get("commit"):
        return {}
    return {"mlflow.source.git.commit": git["commit"], "vico.git_dirty": str(git.get("dirty")).lower()}


def _reused_run_id(name: str, entry: StageEntry, run: str, site: Site) -> str:
    """Return the id of the MLflow run of a reused stage in the run that made it."""
    state = SentState.of(site.storage / "runs" / run, site)
    return state.runs[name].id if name in state.runs else entry.mlflow_run_id or ""


def _first_attempt(folder: StageFolder) -> int | None:
    names = [path.name for path in folder.path.glob("attempts/*")]
    return min((int(name) for name in names if name.isdigit()), default=None)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
