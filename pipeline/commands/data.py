"""Commands for records: write a first pipeline file; check, build and repair shards."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    SiteOption,
    StorageOption,
    answer_stream,
    print_errors,
    print_json,
    site_of,
)

if TYPE_CHECKING:
    from stages.shard.check import CheckReport


def init(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file to write.")] = Path(
        "pipeline.yaml"
    ),
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Folder with *.jsonl rows and their pictures; a meta.json is written to it."
        ),
    ] = None,
    model: Annotated[
        Path, typer.Option("--model", help="Folder or Hub id of the model to start from.")
    ] = Path("models/small-internvl"),
) -> None:
    """Write a commented pipeline file.

    With --data also write an InternVL meta file for the folder, and check the first rows.
    """
    from data_prep.records.internvl import read_meta
    from data_prep.records.meta_files import first_row_counts, meta_of_folder, write_meta
    from pipeline.commands.project_template import META_NAME, refuse_existing, write_pipeline

    refuse_existing(out)
    records = "{format: demo, num_samples: 1600}"
    if data is not None:
        meta = data / META_NAME
        refuse_existing(meta)
        write_meta(meta, meta_of_folder(data))
        for record_set in read_meta(meta.resolve()):
            counts = first_row_counts(record_set.annotation, record_set.root).most_common()
            text = ", ".join(f"{count} {result}" for result, count in counts) or "none"
            typer.echo(f"{record_set.name}: pictures in {record_set.root}; first rows: {text}")
        typer.echo(f"wrote {meta}")
        records = f"{{format: internvl, path: {meta}}}"
    write_pipeline(out, records, str(model))
    typer.echo(f"wrote {out}; next: vico data check {out}")


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
        report = check_records(shard_config, sets, inputs.model_folder, opened_site)
        if as_json:
            print_json(answer, report)
        else:
            stream.write(_shown(report))


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
    from pipeline.progress import Display
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


def _shown(report: "CheckReport") -> str:
    lines = [f"read {report['read']} = good {report['written']} + to quarantine {report['quarantined']}"]
    for name, counts in report["sources"].items():
        lines.append(f"  {name}: read {counts['read']}, good {counts['written']}")
    lines.append("split: " + ", ".join(f"{name} {count}" for name, count in report["splits"].items()))
    for reason, count in report["reasons"].items():
        lines.append(f"{reason}: {count}")
        for row in report["examples"][reason]:
            lines.append(f"  {row['source']} line {row['line']}: {row['message'][:120]}")
    return "\n".join(lines) + "\n"
