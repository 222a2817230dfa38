"""Lineage of a run, from its records to the export: stages, inputs, code, attempts, settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.settings.yaml_files import yaml_text
from pipeline.config.dotted_keys import flattened_text
from pipeline.config.graph import SOURCES
from pipeline.planning.reasons import mixed_code
from pipeline.report.run_files import RunFiles
from pipeline.report.tables import Row, Table, moment, size
from pipeline.results.records import Record
from pipeline.results.states import stage_state
from pipeline.terminal.progress import duration

_DIGEST_CHARS = 12
_UNSET = ("", "null", "false", "[]", "{}")
"""Values of settings of the inputs that say nothing."""


@dataclass(frozen=True)
class Lineage:
    """What a run was made from and by."""

    stages: Table
    sources: Table
    results: Table
    commands: Table
    digests: Table
    """Fingerprints and digests in full."""
    settings: str
    """The config as YAML."""


def lineage(files: RunFiles) -> Lineage:
    """Return the lineage of a run, as far as it has come."""
    run = files.run
    return Lineage(
        stages=_stages_table(files),
        sources=_sources_table(files),
        results=_results_table(files),
        commands=_commands_table(files),
        digests=_digests_table(files),
        settings=yaml_text(run.config),
    )


def _stages_table(files: RunFiles) -> Table:
    rows, notes = [], []
    for stage, entry in files.run.stages.items():
        record = files.records[stage].record if stage in files.records else None
        made_in = entry.reused_from if entry.reused_from not in (None, files.run.run) else "this run"
        cells = (
            stage,
            stage_state(files.run, entry),
            entry.fingerprint[:_DIGEST_CHARS],
            "-" if record is None else _inputs(files, record),
            "-" if record is None else f"{record.output_digest[:_DIGEST_CHARS]}\n{_output_size(record)}",
            "-" if record is None else _code(record),
            "-" if record is None else str(made_in),
            str(entry.attempt) if entry.attempt else "-",
        )
        rows.append(Row(cells, is_marked=entry.state in ("failed", "interrupted")))
        if record is not None:
            notes += [f"{stage}: {note}" for note in _code_notes(record)]
        elif stage in files.faults:
            notes.append(files.why_missing(stage))
    columns = (
        "stage",
        "state",
        "fingerprint",
        "made from (digest of each input)",
        "output",
        "code",
        "made in",
        "attempts",
    )
    return Table("Stages, in the order they run", columns, rows, num_numbers=1, notes=notes)


def _inputs(files: RunFiles, record: Record) -> str:
    """Return the inputs with their digests; an input that is not what its stage put out says so."""
    adopted = (files.run.config.get("inputs") or {}).get("adopt", {}).get(record.stage)
    if adopted is not None:
        return f"adopted from {adopted}"
    texts = []
    for name, digest in record.inputs.items():
        source = files.records.get(name)
        differs = source is not None and source.record.output_digest != digest
        texts.append(f"{name} {digest[:_DIGEST_CHARS]}{' (not the output above)' if differs else ''}")
    return "\n".join(texts) or "-"


def _output_size(record: Record) -> str:
    num_files = len(record.outputs)
    total = size(sum(file.bytes for file in record.outputs.values()))
    return f"{num_files:,} file{'s' * (num_files != 1)}, {total}"


def _code(record: Record) -> str:
    commit = record.git.get("commit")
    text = commit[:_DIGEST_CHARS] if commit else "no commit recorded"
    return f"{text}{', changed files' if record.git.get('dirty') else ''}"


def _code_notes(record: Record) -> list[str]:
    """Return what is unusual about the code of a result."""
    notes = []
    if record.git.get("dirty"):
        notes.append("tracked files differed from the commit; the record has their digests")
    if record.git.get("error"):
        notes.append(f"git said: {record.git['error']}")
    mixed = mixed_code(record)
    return [*notes, mixed] if mixed else notes


def _sources_table(files: RunFiles) -> Table:
    """Return what came from outside: the inputs of the config, and the digests that stages read of them."""
    digests: dict[str, list[str]] = {}
    for stage_record in files.records.values():
        for name, digest in stage_record.record.inputs.items():
            if name in SOURCES and digest not in digests.setdefault(name, []):
                digests[name].append(digest)
    rows = [Row((f"sha256 of {name}", ", ".join(values))) for name, values in digests.items()]
    settings = {
        name: value
        for name, value in flattened_text(files.run.config.get("inputs") or {}).items()
        if value not in _UNSET
    }
    rows += [Row((f"inputs.{name}", value)) for name, value in settings.items()]
    return Table("Inputs from outside", ("input", "value"), rows)


def _results_table(files: RunFiles) -> Table:
    rows = []
    for stage, stage_record in files.records.items():
        counts = stage_record.record.counts
        rows.append(
            Row((stage, ", ".join(f"{_words(name)} {_count(value)}" for name, value in counts.items())))
        )
    return Table("What each stage counted", ("stage", "counts"), rows)


def _words(name: str) -> str:
    return name.removeprefix("num_").replace("_", " ")


def _count(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _commands_table(files: RunFiles) -> Table:
    run = files.run
    rows = [
        Row(
            (moment(attempt.started), moment(attempt.ended), attempt.state, attempt.host, attempt.user or "-")
        )
        for attempt in run.attempts
    ]
    notes: Sequence[str] = () if rows else ("No command has worked on the run yet.",)
    columns = ("started", "ended", "state", "host", "user")
    return Table("Commands that worked on the run", columns, rows, notes=notes)


def _digests_table(files: RunFiles) -> Table:
    rows = []
    for stage, entry in files.run.stages.items():
        record = files.records[stage].record if stage in files.records else None
        values: Mapping[str, str] = {"fingerprint": entry.fingerprint}
        if record is not None:
            values = {**values, "output": record.output_digest, "source files": record.source_digest}
            values |= {f"input {name}": digest for name, digest in record.inputs.items()}
        rows += [Row((f"{stage}: {name}", value)) for name, value in values.items() if value]
    return Table("Fingerprints and digests (sha256) in full", ("of", "digest"), rows)


def stage_times(files: RunFiles) -> Table:
    """Return when each stage ran and how long it took."""
    records = {stage: stage_record.record for stage, stage_record in files.records.items()}
    longest = max((record.seconds for record in records.values()), default=0.0)
    rows = [
        Row(
            (stage, moment(record.started), moment(record.ended), record.site, duration(record.seconds)),
            share=record.seconds / longest if longest else 0.0,
        )
        for stage, record in records.items()
    ]
    total = sum(record.seconds for record in records.values())
    notes = [f"All finished stages together: {duration(total)}."] if rows else ["No stage has finished."]
    columns = ("stage", "started", "ended", "site", "time")
    return Table("Times of the finished stages", columns, rows, num_numbers=1, notes=notes)
