"""Commands that explain runs and clear up after them."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.options import (
    JsonOption,
    RunArgument,
    SiteOption,
    StorageOption,
    answer_stream,
    print_errors,
    print_json,
    site_of,
)
from vico.errors import UserError


def audit(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Id, beginning of an id, or `latest`.")
    ] = None,
    reap: Annotated[
        bool,
        typer.Option(
            "--reap",
            help="First end the MLflow runs of drivers that are dead, and send MLflow what it lacks.",
        ),
    ] = False,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="KEY", help="Only say where this sample was used.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Only say which samples made step N, from 1.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that all that is recorded of a run still holds: files, digests, lineage, metrics, MLflow."""
    from pipeline.audit.findings import log_report
    from pipeline.audit.run import audit_run
    from pipeline.commands.tables import console, findings_table

    if run is None and not reap:
        raise UserError("RUN is missing; name a run (or `latest`), or give --reap")
    where = site_of(site, storage)
    if reap and not _reaped(where):
        sys.exit(1)
    if run is None:
        return
    if sample is not None or step is not None:
        _show_samples(where, run, sample, step, as_json)
        return
    found = audit_run(where, run)
    unlogged = log_report(where, run, found, datetime.now(UTC).isoformat(timespec="seconds"))
    if unlogged:
        found.note("pipeline", unlogged)
    if as_json:
        print_json(sys.stdout, found.as_json())
    else:
        if found.problems:
            console().print(findings_table(found))
        for note in found.notes:
            console().print(f"note: {note}", markup=False)
        checked = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.checked.items())
        console().print(f"{len(found.problems)} problems; checked {checked}", markup=False)
    sys.exit(1 if found.problems else 0)


def diff(
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The run to hold against it.")],
    curves: Annotated[
        Path | None, typer.Option("--curves", metavar="FILE", help="Draw the metrics that differ (PNG).")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two runs: config, inputs, code, packages, metrics, outputs."""
    from pipeline.commands.tables import console, differences_table
    from pipeline.explain.diff import run_differences

    folder = site_of(site, storage).storage
    found = run_differences(folder, first, second)
    if curves is not None:
        from pipeline.explain.diff import draw_curves

        typer.echo(f"{draw_curves(folder, found, curves)} curves in {curves}", err=True)
    if as_json:
        print_json(sys.stdout, found)
    else:
        console().print(differences_table(found))


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
    from pipeline.config.graph import pipeline_graph
    from pipeline.explain import reproduce

    where, graph = site_of(site, storage), pipeline_graph()
    recipe = reproduce.write_recipe(where, run, out, fresh, graph)
    with answer_stream(as_json) as (stream, answer):
        if verify:
            reproduce.verify(recipe, where, graph, stream)
        if as_json:
            print_json(answer, recipe.as_json())
        else:
            for note in recipe.notes:
                typer.echo(f"# {note}")
            typer.echo(recipe.command)
            for name in recipe.differs or ():
                typer.echo(f"differs: {name}")
            if recipe.differs == []:
                typer.echo("every output is the same, byte for byte")
    sys.exit(1 if recipe.differs else 0)


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
    from pipeline.commands.tables import console, garbage_table
    from pipeline.results.garbage import collect
    from pipeline.storage.lease import LeaseHeld

    try:
        found = collect(site_of(site, storage).storage, drop or (), dry_run=dry_run)
    except LeaseHeld as held:
        print_errors(str(held))
        sys.exit(1)
    if as_json:
        total = sum(one.bytes for one in found)
        print_json(
            sys.stdout, {"dry_run": dry_run, "bytes": total, "removed": [one.as_json() for one in found]}
        )
    else:
        console().print(garbage_table(found, dry_run))


def _show_samples(site: Any, run: str, sample: str | None, step: int | None, as_json: bool) -> None:
    """The answer to --sample or --step."""
    from pipeline.audit.samples import RunSamples
    from pipeline.commands.tables import console, sample_tables, step_tables

    if sample is not None and step is not None:
        raise UserError("--sample and --step are two questions; ask one at a time")
    samples = RunSamples(site, run)
    found = samples.sample(sample) if sample is not None else samples.step(step)
    if as_json:
        print_json(sys.stdout, found)
        return
    for table in sample_tables(found) if sample is not None else step_tables(found):
        console().print(table)


def _reaped(site: Any) -> bool:
    """Mend what is stale in MLflow and say so on standard error; whether all of it could be mended."""
    if not site.tracking.enabled:
        raise UserError(f"--reap: tracking.enabled is false in site {site.name}; name the site with MLflow")
    from pipeline.tracking.reap import reap

    done, left = reap(site)
    for line in done:
        typer.echo(line, err=True)
    for line in left:
        print_errors(line)
    return not left
