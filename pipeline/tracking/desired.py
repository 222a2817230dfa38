"""What MLflow should show of a run, read from run.json and the store. Used by tracking; knows no MLflow."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from cluster.site import Site
from pipeline.config.pipeline_file import flattened
from pipeline.identity.fingerprints import digest
from pipeline.identity.provenance import git_state
from pipeline.results.runs import PIPELINE, RunFile, StageEntry, State
from pipeline.results.stage_folder import Record, StageFolder
from pipeline.tracking.sent import SentState

STATUS: dict[State, str] = {
    "pending": "KILLED",  # of a stage: a command on the run has begun and is not there yet
    "running": "RUNNING",
    "done": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "cancelled": "KILLED",
}
TABLE_BYTES = 1_000_000
"""Larger JSON files of an output stay in the store alone."""
MANIFEST = "manifest.json"
"""The file by which a data set in an output is known."""
HANDED_OUT = "export"
"""The stage whose model becomes a version in the model registry."""
_NO_DATA = ("model", "tokenizer")


@dataclass(frozen=True)
class DataSet:
    name: str
    digest: str
    source: Mapping[str, Any]
    context: str
    profile: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelOutput:
    name: str
    uri: str
    digest: str

    @property
    def mark(self) -> str:
        return f"{self.name}:{self.digest}"


@dataclass(frozen=True)
class Projection:
    """What one MLflow run should show: the pipeline's, or that of a stage."""

    name: str
    began: str
    """Which beginning of the stage it is. Begun afresh, its output set aside, it is another MLflow run."""
    title: str
    status: str
    start_s: float
    end_s: float | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    attempts: Path | None = None
    """Where metrics lie; None where none are to be sent."""
    counts: Mapping[str, float] = field(default_factory=dict)
    datasets: tuple[DataSet, ...] = ()
    models: tuple[ModelOutput, ...] = ()
    registers_as: str = ""
    """Name under which the models become versions in the model registry; empty where they do not."""
    files: tuple[tuple[Path, str], ...] = ()
    """Files with the artifact folder each belongs in."""
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ended(self) -> bool:
        return self.status != "RUNNING"


def of_pipeline(run: RunFile, site: Site) -> Projection:
    """The parent: what belongs to the run as a whole."""
    blocks = {name: run.config[name] for name in run.stages if name in run.config}
    tags = {
        "vico.run": run.run,
        "vico.stage": PIPELINE,
        "vico.pipeline": run.pipeline,
        "vico.state": run.state,
        "vico.site": run.site,
        "vico.storage": site.storage_address,
        "vico.num_commands": str(len(run.attempts)),
        **_git_tags(git_state()),
    }
    if run.attempts:
        tags["vico.host"] = run.attempts[-1].host
    if run.error:
        tags["vico.error"] = run.error
    if run.submission:
        tags["vico.submission"] = str(run.submission.get("id"))
    ended = run.attempts[-1].ended if run.attempts else None
    return Projection(
        name=PIPELINE,
        began="1",
        title=f"{run.experiment} {run.run}",
        status="RUNNING" if run.state == "pending" else STATUS[run.state],
        start_s=_seconds(run.created),
        end_s=_seconds(ended) if ended else None,
        params=flattened({"seed": run.config.get("seed"), **blocks}),
        tags=tags,
        texts={"config.yaml": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)},
    )


def of_stage(run: RunFile, name: str, site: Site) -> Projection | None:
    """A stage of the run; None before anything of it has begun."""
    entry = run.stages[name]
    folder = StageFolder(site.storage, name, entry.fingerprint)
    began = _first_attempt(folder)
    if began is None or entry.attempt == 0:
        return None
    record = folder.record() if entry.state == "done" else None
    attempt = folder.last_attempt_file()
    inputs = record.inputs if record else attempt.inputs if attempt else {}
    elsewhere = entry.reused and entry.reused_from != run.run
    tags = _stage_tags(run, name, entry, site, record)
    tags |= {f"vico.input.{source}": value for source, value in inputs.items()}
    return Projection(
        name=name,
        began=str(began),
        title=name,
        status=STATUS[entry.state],
        start_s=_seconds(record.started if record else attempt.started if attempt else run.created),
        end_s=_seconds(record.ended) if record else None,
        params=flattened(run.config.get(name, {})),
        tags=tags,
        attempts=None if elsewhere else folder.path / "attempts",
        counts={} if elsewhere or record is None else dict(_numbers(record.counts)),
        datasets=tuple(_datasets(run, name, site, inputs, record)),
        models=() if elsewhere or record is None else tuple(_models(folder, record)),
        registers_as=run.experiment if name == HANDED_OUT else "",
        files=() if elsewhere else tuple(_files(folder)),
    )


def _stage_tags(
    run: RunFile, name: str, entry: StageEntry, site: Site, record: Record | None
) -> dict[str, str]:
    tags = {
        "vico.run": run.run,
        "vico.stage": name,
        "vico.fingerprint": entry.fingerprint,
        "vico.state": entry.state,
        "vico.attempt": str(entry.attempt),
        "vico.output": _output_place(site, name, entry.fingerprint),
        "vico.site": record.site if record else run.site,
    }
    if entry.reused and entry.reused_from and entry.reused_from != run.run:
        tags["vico.reused_from"] = entry.reused_from
        tags["vico.reused_child"] = _child(name, entry, site)
    if record is None:
        host = run.attempts[-1].host if run.attempts else ""
        return tags | {
            "vico.host": host,
            "vico.world_size": str(site.resources.workers),
            **_git_tags(git_state()),
        }
    return tags | {
        "vico.host": str(record.facts.get("host", "")),
        "vico.world_size": str(record.facts.get("resources", {}).get("workers", "")),
        "vico.code_version": str(record.identity.get("code_version", "")),
        "vico.source_digest": record.source_digest,
        "vico.output_digest": record.output_digest,
        "vico.seconds": f"{record.seconds:.3f}",
        **_git_tags(record.git),
    }


def _child(name: str, entry: StageEntry, site: Site) -> str:
    """The MLflow run of the reused stage in the run it comes from."""
    state = SentState.of(site.storage / "runs" / entry.reused_from, site.tracking_place)
    return state.runs[name].id if name in state.runs else entry.mlflow_run_id or ""


def _git_tags(git: Mapping[str, Any]) -> dict[str, str]:
    if not git.get("commit"):
        return {}
    return {"mlflow.source.git.commit": git["commit"], "vico.git_dirty": str(git.get("dirty")).lower()}


def _first_attempt(folder: StageFolder) -> int | None:
    names = [path.name for path in folder.path.glob("attempts/*")]
    return min((int(name) for name in names if name.isdigit()), default=None)


def _datasets(
    run: RunFile, name: str, site: Site, inputs: Mapping[str, str], record: Record | None
) -> Iterator[DataSet]:
    for source, found in inputs.items():
        if source in run.stages:
            output = _output_place(site, source, run.stages[source].fingerprint)
            yield DataSet(source, found, {"digest": found, "path": output}, "input")
        elif source not in _NO_DATA:
            given = (run.config.get("inputs") or {}).get(source) or {}
            yield DataSet(source, found, {"digest": found, "records": given}, "input")
    if record and MANIFEST in record.outputs:
        found = record.outputs[MANIFEST].sha256
        path = _output_place(site, name, record.fingerprint)
        counts = dict(_numbers(record.counts))
        yield DataSet(name, found, {"digest": found, "path": path}, "output", counts)


def _models(folder: StageFolder, record: Record) -> Iterator[ModelOutput]:
    """Each folder of the output that holds weights; weights that lie in the output itself, each file."""
    weights = [name for name in record.outputs if name.endswith(".safetensors")]
    for place in sorted({name.rpartition("/")[0] or name for name in weights}):
        files = {
            name: file.sha256 for name, file in record.outputs.items() if f"{name}/".startswith(f"{place}/")
        }
        title = f"{record.stage}-{_plain(place.removesuffix('.safetensors'))}"
        where = folder.storage.place(folder.output / place)
        yield ModelOutput(title, where if "://" in where else Path(where).as_uri(), digest(files))


def _output_place(site: Site, stage: str, fingerprint: str) -> str:
    folder = StageFolder(site.storage, stage, fingerprint)
    return folder.storage.place(folder.output)


def _plain(name: str) -> str:
    """A name without the characters that MLflow refuses in names of models."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def _files(folder: StageFolder) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.output.glob("figures/*.png")):
        if not path.name.startswith("."):
            yield path, "figures"
    for path in sorted([*folder.output.glob("*.json"), *folder.output.glob("*.md")]):
        if not path.name.startswith(".") and path.stat().st_size <= TABLE_BYTES:
            yield path, "tables"


def _numbers(counts: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in counts.items():
        if isinstance(value, int | float):
            yield name, float(value)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
