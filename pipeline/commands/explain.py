"""Commands that check, compare, repeat and clear away runs."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    JsonOption,
    RunArgument,
    SiteOption,
    StorageOption,
    answer_stream,
    site_file,
    site_of,
)
from pipeline.terminal.output import error_terminal, print_errors, print_json, terminal
from vico.errors import UserError

if TYPE_CHECKING:
    from cluster.site import Site
    from pipeline.audit.findings import Findings


def audit(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="The run's id, a unique prefix of it, or `latest`."),
    ] = None,
    reap: Annotated[
        bool,
        typer.Option(
            "--reap",
            help="First correct MLflow: end the runs of dead drivers, and send what is missing.",
        ),
    ] = False,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="KEY", help="Only show where this sample was used.")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", help="Only show the samples of training step N, from 1."),
    ] = None,
    seal: Annotated[
        Path | None,
        typer.Option(
            "--seal", metavar="FILE", help="If there are no problems, write the run's seal to FILE."
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="Also find what changed since the seal was written."),
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a run still matches its records.

    The check covers files, digests, inputs, metrics and MLflow. Exit code 1: there are problems. Nothing in a
    store is signed: only a seal that is kept elsewhere shows that output, record and MLflow were rewritten
    alike.
    """
    if run is None and not reap:
        raise UserError("RUN is missing; name a run (or `latest`), or give --reap")
    _check_seal_options(run, seal, against, is_question=sample is not None or step is not None)
    opened_site = site_of(site, storage)
    if reap and not _reaped(opened_site):
        sys.exit(1)
    if run is None:
        return
    if sample is not None or step is not None:
        _show_samples(opened_site, run, sample, step, as_json)
        return
    _show_audit(opened_site, run, seal, against, as_json)


def _check_seal_options(run: str | None, seal: Path | None, against: Path | None, is_question: bool) -> None:
    if seal is None and against is None:
        return
    option = "--seal" if against is None else "--against"
    if seal is not None and against is not None:
        raise UserError("--seal writes a seal and --against compares with one; give one of them")
    if run is None or is_question:
        raise UserError(f"{option} belongs to the audit of a run; give RUN, and no --sample or --step")


def _show_audit(site: "Site", run: str, seal: Path | None, against: Path | None, as_json: bool) -> None:
    """Audit the run, write its seal or compare with one, print the findings and end the process."""
    from pipeline.audit.report import log_report
    from pipeline.audit.run import audit_run, audit_with_seal

    findings = (
        audit_run(site, run)
        if seal is None and against is None
        else audit_with_seal(site, run, seal, against)
    )
    unlogged = log_report(site, run, findings, datetime.now(UTC).isoformat(timespec="seconds"))
    if unlogged:
        findings.note("pipeline", unlogged)
    if as_json:
        print_json(sys.stdout, findings.as_json())
    else:
        _show_findings(findings)
    sys.exit(1 if findings.problems else 0)


def diff(
    first: Annotated[str, typer.Argument(metavar="RUN", help="The first run.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The run to compare it with.")],
    curves: Annotated[
        Path | None,
        typer.Option("--curves", metavar="FILE", help="Plot the metrics that differ into this PNG file."),
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two runs.

    The comparison covers config, inputs, code, packages, counts, metrics and outputs.
    """
    from pipeline.commands.tables import differences_table
    from pipeline.explain.diff import run_differences

    folder = site_of(site, storage).storage
    differences = run_differences(folder, first, second)
    if curves is not None:
        from pipeline.explain.diff_curves import draw_curves

        error_terminal().line(f"{draw_curves(folder, differences, curves)} curves in {curves}")
    if as_json:
        print_json(sys.stdout, differences)
    else:
        terminal().table(differences_table(differences))


def reproduce(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the config to this file; default: RUN.yaml."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also run it in a new storage, and compare every output.")
    ] = False,
    fresh: Annotated[
        Path | None, typer.Option("--fresh-storage", metavar="FOLDER", help="The storage of that new run.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the config that repeats a run, and print the command.

    Notes before the command say what must be as it was: code, packages and inputs.
    """
    from pipeline.config.graph import pipeline_graph
    from pipeline.explain import reproduce

    opened_site, graph = site_of(site, storage), pipeline_graph()
    given_file = None if site is None else site_file(site)
    recipe = reproduce.write_recipe(opened_site, run, out, fresh, graph, given_file)
    with answer_stream(as_json) as (stream, answer):
        if verify:
            reproduce.verify(recipe, opened_site, graph, stream)
        if as_json:
            print_json(answer, recipe.as_json())
        else:
            for note in recipe.notes:
                terminal().line(f"# {note}")
            terminal().line(recipe.command)
            for name in recipe.differs or ():
                terminal().line(f"differs: {name}")
            if recipe.differs == []:
                terminal().line("every output is the same, byte for byte")
    sys.exit(1 if recipe.differs else 0)


def report(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the page to this file; default: RUN.html."),
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page about a run.

    It shows results, pictures, training, lineage and machines, and says what is missing. The page needs no
    other file and loads nothing, so it can be sent to others.
    """
    from pipeline.report.write import write_report

    with answer_stream(as_json) as (_, answer):
        written = write_report(site_of(site, storage), run, out)
        if as_json:
            print_json(answer, written.as_json())
            return
    for reason in written.missing:
        terminal().line(f"not shown: {reason}")
    terminal().line(f"report: {written.path}")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", metavar="RUN", help="Also remove this run; can be repeated.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what no run needs.

    That is: results of removed runs, superseded results, and incomplete files left by a crash.
    """
    from pipeline.commands.tables import garbage_table
    from pipeline.results.garbage import collect_garbage
    from pipeline.storage.leases import LeaseHeld

    try:
        garbage = collect_garbage(site_of(site, storage).storage, drop or (), dry_run=dry_run)
    except LeaseHeld as held:
        print_errors(str(held))
        sys.exit(1)
    if as_json:
        total = sum(piece.bytes for piece in garbage)
        removed = [piece.as_json() for piece in garbage]
        print_json(sys.stdout, {"dry_run": dry_run, "bytes": total, "removed": removed})
    else:
        terminal().table(garbage_table(garbage, dry_run))


def _show_findings(findings: "Findings") -> None:
    """Print the problems as a table, then notes and counts."""
    from pipeline.commands.tables import findings_table

    if findings.problems:
        terminal().table(findings_table(findings))
    for note in findings.notes:
        terminal().line(f"note: {note}")
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in findings.checked.items())
    terminal().line(f"{len(findings.problems)} problems; checked {counts}")


def _show_samples(site: "Site", run: str, sample: str | None, step: int | None, as_json: bool) -> None:
    """Print the answer to --sample or --step."""
    from pipeline.audit.samples import RunSamples
    from pipeline.commands.tables import sample_tables, step_tables

    if sample is not None and step is not None:
        raise UserError("--sample and --step are two questions; ask one at a time")
    samples = RunSamples(site, run)
    if sample is not None:
        answer = samples.sample(sample)
        tables = sample_tables(answer)
    else:
        assert step is not None
        answer = samples.step(step)
        tables = step_tables(answer)
    if as_json:
        print_json(sys.stdout, answer)
        return
    for table in tables:
        terminal().table(table)


def _reaped(site: "Site") -> bool:
    """Correct MLflow and show what was done on standard error; return whether nothing is left to correct."""
    if not site.tracking.enabled:
        raise UserError(f"--reap: tracking.enabled is false in site {site.name}; name the site with MLflow")
    from pipeline.tracking.reap import reap

    done, left = reap(site)
    for line in done:
        error_terminal().line(line)
    for line in left:
        print_errors(line)
    return not left
