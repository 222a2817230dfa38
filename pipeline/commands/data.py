"""Commands for records: write a first pipeline file; check, build and repair shards."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    SiteOption,
    StorageOption,
    answer_stream,
    site_of,
)
from pipeline.terminal.output import Terminal, print_errors, print_json, terminal
from vico.errors import UserError, one_line

if TYPE_CHECKING:
    from pipeline.commands.project_template import Records
    from stages.shard.check import CheckReport
    from stages.shard.config import ShardConfig
    from stages.shard.first_rows import CheckedFile

DEMO_MODEL = "models/small-internvl"


def init(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file to write.")] = Path(
        "pipeline.yaml"
    ),
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Folder with rows (JSON lines or lists, parquet, tars) and their pictures; for InternVL "
            "rows a meta.json is written to it.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Folder or Hub id of the model to start from.")
    ] = DEMO_MODEL,
) -> None:
    """Write a commented pipeline file.

    For a model of a published size it has budgets that suit the model.

    With --data also check the first rows of the folder, name their format, and write an InternVL meta file if
    they need one.
    """
    from pipeline.commands.model_advice import model_advice
    from pipeline.commands.project_template import pipeline_text, refuse_existing, write_new
    from stages.shard.config import ShardConfig
    from vico.model_files import weight_files
    from vico.settings import load_settings

    refuse_existing(out)
    consistency: Mapping[str, object] = {}
    if model != DEMO_MODEL or Path(model).is_dir():
        advice = model_advice(model)
        for line in advice.lines():
            terminal().line(line)
        consistency = advice.consistency()
    records: Records = {"format": "demo", "num_samples": 1600}
    max_tiles = ShardConfig().max_tiles
    if data is not None:
        folder = _model_of_rows(model)
        max_tiles = min(max_tiles, load_settings(folder).max_tiles)
        records = _records_of_folder(data, ShardConfig(max_tiles=max_tiles), folder)
    elif Path(model).is_dir() and weight_files(Path(model)):
        max_tiles = min(max_tiles, load_settings(model).max_tiles)
    write_new(out, pipeline_text(str(out), records, model, max_tiles, consistency))
    terminal().line(f"wrote {out}; next: vico data check {out}")


def _model_of_rows(model: str) -> Path:
    """Return the folder of the model whose tokenizer and tiles the checks of rows need."""
    from vico.checkpoints.hub import model_folder
    from vico.model_files import check_model_folder

    folder = model_folder(model)
    if not folder.is_dir():
        raise UserError(
            f"--model {model} is not a folder; the rows are checked for it, so give the folder or Hub id of "
            "an InternVL checkpoint"
        )
    return check_model_folder(folder)


def _records_of_folder(data: Path, config: "ShardConfig", model: Path) -> "Records":
    """Show the format of the folder's rows and the result of their checks; return `inputs.records` for them.

    For InternVL rows also write the meta file.
    """
    from data_prep.records.meta_files import meta_of_files, meta_text
    from pipeline.commands.project_template import META_NAME, write_new
    from stages.shard.first_rows import checked_folder

    checked = checked_folder(data, config, model)
    for file in checked.files:
        for line in _checked_lines(file):
            terminal().wrapped(line)
    for path in checked.unused:
        terminal().line(f"{path.name}: not used; to read it, too, add a source to inputs.records")
    if checked.format != "internvl":
        return checked.records
    meta = data / META_NAME
    records = {"format": "internvl", "path": str(meta)}
    text = meta_text(meta_of_files(data, {file.path: file.root for file in checked.files}))
    if meta.is_file() and meta.read_bytes() == text.encode():
        terminal().line(f"{meta} is already there and fits the rows")
        return records
    if meta.exists():
        raise UserError(
            f"{meta} exists and has other content; move it away, or use it: `vico init` without --data, then "
            f"inputs.records: {{format: internvl, path: {meta}}}"
        )
    write_new(meta, text)
    terminal().line(f"wrote {meta}")
    return records


def _checked_lines(file: "CheckedFile") -> list[str]:
    """Return a line about a file's first rows, and one for the first row of each reason."""
    reasons = Counter(row["reason"] for row in file.faults)
    counts = {"good": file.num_good, **dict(reasons.most_common())}
    text = ", ".join(f"{count} {result}" for result, count in counts.items() if count) or "none"
    pictures = f", pictures in {file.root}" if file.format != "webdataset" else ""
    first_rows = {row["reason"]: row for row in reversed(file.faults)}
    return [
        f"{file.path.name}: format {file.format}{pictures}; first rows: {text}",
        *(
            f"  line {row['line']}, {reason}: {one_line(row['message'], max_chars=None)}"
            for reason, row in sorted(first_rows.items())
        ),
    ]


def check(
    config: ConfigArgument,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how many rows would be quarantined, and why.

    Checks every row as the shard stage does, and writes nothing.
    """
    from data_prep.records.sets import check_slugs, record_sets
    from pipeline.config.graph import pipeline_graph
    from pipeline.config.pipeline_file import load_config
    from stages.shard.check import check_records
    from stages.shard.config import ShardConfig
    from vico.model_files import check_model_folder

    opened_site = site_of(site, storage)
    pipeline_config = load_config(config, pipeline_graph(), overrides or ())
    inputs, shard_config = pipeline_config.inputs, pipeline_config.stage("shard")
    assert isinstance(shard_config, ShardConfig)
    check_model_folder(inputs.model_folder)
    sets = record_sets(inputs.records)
    if inputs.heldout is not None:
        sets += record_sets(inputs.heldout, heldout=True)
        check_slugs(sets)
    with answer_stream(as_json) as (stream, answer):
        report = check_records(shard_config, sets, inputs.model_folder, opened_site.for_stage("shard"))
        if as_json:
            print_json(answer, report)
        else:
            show_report(report, stream)


def build(
    config: ConfigArgument,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run or resume only the shard stage; `vico run` reuses its shards."""
    from pipeline.commands import runs as cli_runs

    cli_runs.run(config, site, storage, overrides, until="shard", as_json=as_json)


def retry(
    config: ConfigArgument,
    rows: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ROWS", help="Files of repaired rows, besides those of inputs.repaired."),
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shard repaired rows that were quarantined.

    The new shards are written beside the old ones, which stay as they are.

    A line of ROWS is {"source", "line", "row"}; without "row" the original line is checked again.
    """
    from pipeline.commands.repaired_rows import NOTHING_REPAIRED, nothing_repaired, outcome, retry_files
    from pipeline.config.graph import pipeline_graph
    from pipeline.config.pipeline_file import load_config
    from pipeline.terminal.progress import Display
    from vico.errors import UserError

    old_files = load_config(config, pipeline_graph(), overrides or ()).inputs.repaired
    new_files = [*map(Path.absolute, rows or ())]
    if not old_files and not new_files:
        raise UserError("no repaired rows; give a file of them, or set inputs.repaired in the pipeline file")
    opened_site = site_of(site, storage)
    with answer_stream(as_json) as (stream, answer), Display(stream) as display:
        result, repaired = retry_files(
            config, opened_site, overrides or (), [*old_files, *new_files], display
        )
        exit_code, message = result.exit_code, result.message
        if not exit_code:
            for line in outcome(config, repaired):
                display.line(line)
            tried = repaired[len(old_files) :] or repaired
            message = nothing_repaired(opened_site, result, tried) or message
            exit_code = 0 if any(file.written for file in tried) else NOTHING_REPAIRED
    if message:
        print_errors(message)
    if as_json:
        about = {"run": result.run, "state": result.state, "storage": str(result.storage)}
        print_json(answer, about | {"repaired": [asdict(file) for file in repaired]})
    sys.exit(exit_code)


def show_report(report: "CheckReport", stream: TextIO) -> None:
    """Write the report as lines: on a terminal they wrap below their beginning, elsewhere they stay whole."""
    shown = Terminal(stream)
    for line in _report_lines(report):
        shown.wrapped(line)


def _report_lines(report: "CheckReport") -> list[str]:
    lines = [f"read {report['read']} = good {report['written']} + to quarantine {report['quarantined']}"]
    for name, counts in report["sources"].items():
        lines.append(f"  {name}: read {counts['read']}, good {counts['written']}")
    splits = ", ".join(f"{name} {count}" for name, count in report["splits"].items())
    lines.append(f"split: {splits or 'no rows'}")
    for reason, count in report["reasons"].items():
        lines.append(f"{reason}: {count}")
        for row in report["examples"][reason]:
            lines.append(f"  {row['source']} line {row['line']}: {one_line(row['message'], max_chars=None)}")
    return [*lines, *report["notes"]]
