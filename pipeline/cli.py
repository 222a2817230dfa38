"""The command line `vico`. Exit codes: 0 done, 1 failed, 2 bad input, 130 and 143 stopped by a signal."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from stages.context import Interrupted
from vico.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train InternVL-style models to spend few visual tokens on simple tiles and many on rich ones.",
)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Pipeline file (YAML).")]
SiteOption = Annotated[str | None, typer.Option("--site", help="Site file, or the name of one in sites/.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id, beginning of an id, or `latest`.")]
StorageOption = Annotated[Path | None, typer.Option("--storage", help="Storage folder; default: the site's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, such as consistency.packs_per_step=4."),
]
ForceOption = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STAGE", help="Run this stage again, and what depends on it."),
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
WaitOption = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for another driver.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict-code", help="Run stages again whose source files have changed.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Entry point: what a user can mend is one `error:` line for each fault and exit code 2."""
    # Logs go to files of the run; without any handler logging would print warnings to the terminal.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        app()
    except UserError as error:
        _print_errors(str(error))
        sys.exit(2)
    except Interrupted as stop:
        sys.exit(128 + signal.Signals[str(stop)])
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def run(
    config: ConfigArgument,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    force: ForceOption = None,
    until: UntilOption = None,
    strict_code: StrictOption = False,
    wait: WaitOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Run a pipeline, or go on with it: what is done is reused, a crash is mended by the same command."""
    from pipeline.graph import pipeline_graph
    from pipeline.progress import Display
    from pipeline.runner import run_pipeline

    request = _request(config, site, storage, overrides, force, until, wait, strict_code)
    with _answer_stream(as_json) as (stream, answer), Display(stream) as display:
        result = run_pipeline(request, pipeline_graph(), display)
    if result.message:
        _print_errors(result.message)
    if as_json:
        _print(answer, {"run": result.run, "state": result.state, "storage": str(result.storage)})
    sys.exit(result.exit_code)


@app.command()
def submit(
    config: ConfigArgument,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    force: ForceOption = None,
    until: UntilOption = None,
    strict_code: StrictOption = False,
    wait: WaitOption = 0.0,
    only_print: Annotated[
        bool, typer.Option("--print", help="Show the job; submit nothing and write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Hand a run to the site's Ray Jobs server; `vico status` and `vico logs -f` follow it."""
    from pipeline.graph import pipeline_graph
    from pipeline.lease import LeaseHeld
    from pipeline.submit import job_text, open_request, submit

    request, graph = (
        _request(config, site, storage, overrides, force, until, wait, strict_code),
        pipeline_graph(),
    )
    if only_print:
        typer.echo(job_text(request, open_request(request, graph)).shown(request.site))
        return
    try:
        submitted = submit(request, graph)
    except LeaseHeld as held:
        _print_errors(str(held))
        sys.exit(1)
    if as_json:
        answer = {"run": submitted.run, "state": submitted.state, "storage": str(submitted.storage)}
        _print(sys.stdout, {**answer, "submission": submitted.submission})
    else:
        typer.echo(submitted.message)


@app.command()
def plan(
    config: ConfigArgument,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    force: ForceOption = None,
    until: UntilOption = None,
    strict_code: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say of every stage whether it would be reused or run, and why. Writes nothing."""
    from pipeline.graph import pipeline_graph
    from pipeline.opening import open_pipeline
    from pipeline.views import console, plan_table

    planned = open_pipeline(
        _request(config, site, storage, overrides, force, until, strict_code=strict_code), pipeline_graph()
    ).planned
    if as_json:
        _print(sys.stdout, [one.as_json() for one in planned])
    else:
        console().print(plan_table(planned))


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Id, beginning of an id, or `latest`.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs, newest first, or show the stages of one."""
    from pipeline.runs import Runs
    from pipeline.submit import as_job_stands
    from pipeline.views import console, run_details, run_summary, runs_table, stages_table

    folder = _site(site, storage).storage
    runs = Runs(folder)
    if run is None:
        found = [as_job_stands(one) for one in runs.all()]
        if as_json:
            _print(sys.stdout, [run_summary(one) for one in found])
        elif found:
            console().print(runs_table(found))
        else:
            console().print(f"no runs in {folder}", markup=False)
        return
    one = as_job_stands(runs.named(run))
    if as_json:
        _print(sys.stdout, run_details(one, folder))
        return
    console().print(f"run {one.run}: {one.state}" + (f" ({one.error})" if one.error else ""), markup=False)
    console().print(stages_table(one, folder))


@app.command()
def logs(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Logs of this stage: driver and ranks.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
) -> None:
    """Print what a run wrote to its log."""
    from pipeline.logs import log_lines
    from pipeline.runs import Runs

    for line in log_lines(Runs(_site(site, storage).storage), run, stage=stage, follow=follow):
        typer.echo(line)


@app.command()
def audit(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Id, beginning of an id, or `latest`.")
    ] = None,
    reap: Annotated[
        bool, typer.Option("--reap", help="First end the MLflow runs of drivers that are dead.")
    ] = False,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that all that is recorded of a run still holds: files, digests, lineage, metrics, MLflow."""
    from pipeline.audit import audit_run
    from pipeline.views import console, findings_table

    if run is None and not reap:
        raise UserError("RUN is missing; name a run (or `latest`), or give --reap")
    where = _site(site, storage)
    if reap and not _reaped(where):
        sys.exit(1)
    if run is None:
        return
    found = audit_run(where, run)
    if as_json:
        _print(sys.stdout, found.as_json())
    else:
        if found.problems:
            console().print(findings_table(found))
        for note in found.notes:
            console().print(f"note: {note}", markup=False)
        checked = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.checked.items())
        console().print(f"{len(found.problems)} problems; checked {checked}", markup=False)
    sys.exit(1 if found.problems else 0)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The run to hold against it.")],
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two runs: config, inputs, code, packages, metrics, outputs."""
    from pipeline.diff import run_differences
    from pipeline.views import console, differences_table

    found = run_differences(_site(site, storage).storage, first, second)
    if as_json:
        _print(sys.stdout, found)
    else:
        console().print(differences_table(found))


@app.command()
def reproduce(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the config goes.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run it in a fresh storage and compare every output.")
    ] = False,
    fresh: Annotated[
        Path | None, typer.Option("--fresh-storage", metavar="FOLDER", help="The storage of that run.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the config of a run and print the command that gives the run again."""
    from pipeline import reproduce
    from pipeline.graph import pipeline_graph

    where, graph = _site(site, storage), pipeline_graph()
    recipe = reproduce.write_recipe(where, run, out, fresh, graph)
    with _answer_stream(as_json) as (stream, answer):
        if verify:
            reproduce.verify(recipe, where, graph, stream)
        if as_json:
            _print(answer, recipe.as_json())
        else:
            for note in recipe.notes:
                typer.echo(f"# {note}")
            typer.echo(recipe.command)
            for name in recipe.differs or ():
                typer.echo(f"differs: {name}")
            if recipe.differs == []:
                typer.echo("every output is the same, byte for byte")
    sys.exit(1 if recipe.differs else 0)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List it; remove nothing.")] = False,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", metavar="RUN", help="Give up this run, too.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what no run needs: results of given-up runs, what was set aside, what was left half-written."""
    from pipeline.garbage import collect
    from pipeline.lease import LeaseHeld
    from pipeline.views import console, garbage_table

    try:
        found = collect(_site(site, storage).storage, drop or (), dry_run=dry_run)
    except LeaseHeld as held:
        _print_errors(str(held))
        sys.exit(1)
    if as_json:
        total = sum(one.bytes for one in found)
        _print(sys.stdout, {"dry_run": dry_run, "bytes": total, "removed": [one.as_json() for one in found]})
    else:
        console().print(garbage_table(found, dry_run))


@app.command()
def route(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A routed model folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw the tiles with their tokens to this PNG.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="Compress a tile from this probability on."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which tiles of pictures get how many tokens."""
    from pipeline.route import route as route_images

    route_images(model, images, out, threshold, as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id, beginning of an id, or `latest`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    layout: Annotated[
        Literal["flash", "hf"],
        typer.Option("--layout", help="flash: published InternVL Flash, for servers; hf: Hugging Face."),
    ],
    site: SiteOption = None,
    storage: StorageOption = None,
) -> None:
    """Write the model of a finished run as a folder that servers or transformers open."""
    from pipeline.export_command import export as export_run

    export_run(_site(site, storage).storage, run, out, layout)
    typer.echo(f"exported to {out}")


def _site(site: str | None, storage: Path | None) -> Any:
    from cluster.site import load_site

    found = load_site(site, storage=storage)
    if found.storage.exists() and not found.storage.is_dir():
        raise UserError(f"storage={found.storage} is a file; name a folder with --storage")
    return found


def _request(
    config: Path,
    site: str | None,
    storage: Path | None,
    overrides: list[str] | None,
    force: list[str] | None,
    until: str | None,
    wait_s: float = 0.0,
    strict_code: bool = False,
) -> Any:
    from pipeline.opening import RunRequest

    where = _site(site, storage)
    asked = tuple(overrides or ()), tuple(force or ()), until
    return RunRequest(config, where, *asked, wait_s, strict_code)


def _reaped(site: Any) -> bool:
    """Close what is stale in MLflow and say so on standard error; whether all of it could be closed."""
    if not site.tracking.enabled:
        raise UserError(f"--reap: tracking.enabled is false in site {site.name}; name the site with MLflow")
    from pipeline.tracking_audit import reap

    closed, left = reap(site)
    for line in closed:
        typer.echo(f"closed in MLflow: {line}", err=True)
    for line in left:
        _print_errors(line)
    return not left


@contextmanager
def _answer_stream(as_json: bool) -> Iterator[tuple[TextIO, TextIO]]:
    """(stream for people, stream for the answer). For a program standard output is the answer's alone:
    whatever else writes to it, libraries and child processes included, is sent to standard error."""
    if not as_json:
        yield sys.stdout, sys.stdout
        return
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    yield sys.stderr, answer


def _print(stream: TextIO, value: Any) -> None:
    stream.write(json.dumps(value, ensure_ascii=False) + "\n")
    stream.flush()


def _print_errors(message: str) -> None:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)


if __name__ == "__main__":
    main()
