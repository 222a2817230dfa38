"""Commands for records: a first pipeline file, a check of rows, the shard stage by itself."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

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
    run_request,
)


def init(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file to write.")] = Path(
        "pipeline.yaml"
    ),
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder with *.jsonl rows and their pictures; gets a meta.json."),
    ] = None,
    model: Annotated[Path, typer.Option("--model", help="Folder of the model to start from.")] = Path(
        "models/small-internvl"
    ),
) -> None:
    """Write a commented pipeline file; with --data also an InternVL meta file, which is checked."""
    from data_prep.records.internvl import read_meta
    from data_prep.records.meta_files import meta_of_folder, probed, write_meta
    from pipeline.commands.project_template import META_NAME, refuse_taken, write_pipeline

    refuse_taken(out)
    records = "{format: demo, num_samples: 1600}"
    if data is not None:
        meta = data / META_NAME
        refuse_taken(meta)
        write_meta(meta, meta_of_folder(data))
        for one in read_meta(meta.resolve()):
            counts = ", ".join(f"{n} {what}" for what, n in probed(one.annotation, one.root).most_common())
            typer.echo(f"{one.name}: pictures in {one.root}; first rows: {counts or 'none'}")
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
    """Check every row as the shard stage would, and say what is wrong with which; writes nothing."""
    from data_prep.records.config import check_slugs, record_sets
    from pipeline.config.graph import pipeline_graph
    from pipeline.config.pipeline_file import load_config
    from stages.shard.check import check_records
    from vico.settings import check_model_folder

    request = run_request(config, site, storage, overrides, None, "shard")
    content = load_config(request.config, pipeline_graph(), request.overrides)
    inputs = content.inputs
    check_model_folder(inputs.model_folder)
    sets = record_sets(inputs.records)
    if inputs.heldout is not None:
        sets += record_sets(inputs.heldout, heldout=True)
        check_slugs(sets)
    with answer_stream(as_json) as (stream, answer):
        report = check_records(content.stage("shard"), sets, inputs.model_folder, request.site)
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
    """Run the shard stage by itself, or go on with it; `vico run` reuses what it wrote."""
    from pipeline.commands import runs as cli_runs

    cli_runs.run(config, site, storage, overrides, until="shard", as_json=as_json)


def retry(
    config: ConfigArgument,
    rows: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[ROWS]..", help="Files of repaired rows, after those of inputs.repaired."),
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check quarantined rows again that were mended, and shard them beside the old shards.

    A line of ROWS is {"source", "line", "row"}; without "row" the original line is checked again.
    """
    from pipeline.config.graph import pipeline_graph
    from pipeline.config.pipeline_file import load_config
    from pipeline.progress import Display
    from pipeline.running.runner import run_pipeline
    from vico.errors import UserError

    given = list(overrides or ())
    files = [*load_config(config, pipeline_graph(), given).inputs.repaired, *map(Path.absolute, rows or ())]
    if not files:
        raise UserError("no repaired rows; give a file of them, or inputs.repaired in the pipeline file")
    with answer_stream(as_json) as (stream, answer), Display(stream) as display:
        for number in range(len(files) + 1):
            chosen = json.dumps([str(path) for path in files[:number]])
            asked = [*given, f"inputs.repaired={chosen}"]
            result = run_pipeline(
                run_request(config, site, storage, asked, None, "shard"), pipeline_graph(), display
            )
            if result.exit_code:
                break
        else:
            display.line(f"use these shards with inputs.repaired: {chosen} in {config}")
    if result.message:
        print_errors(result.message)
    if as_json:
        print_json(answer, {"run": result.run, "state": result.state, "storage": str(result.storage)})
    sys.exit(result.exit_code)


def _shown(report: dict[str, Any]) -> str:
    lines = [f"read {report['read']} = good {report['written']} + to quarantine {report['quarantined']}"]
    for name, counts in report["sources"].items():
        lines.append(f"  {name}: read {counts['read']}, good {counts['written']}")
    lines.append("split: " + ", ".join(f"{name} {count}" for name, count in report["splits"].items()))
    for reason, count in report["reasons"].items():
        lines.append(f"{reason}: {count}")
        for row in report["examples"][reason]:
            lines.append(f"  {row['source']} line {row['line']}: {row['message'][:120]}")
    return "\n".join(lines) + "\n"
