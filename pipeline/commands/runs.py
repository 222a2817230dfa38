"""Commands that start runs and follow them."""

import sys
from typing import Annotated

import typer

from pipeline.commands.options import (
    ConfigArgument,
    ForceOption,
    JsonOption,
    RunArgument,
    SetOption,
    SiteOption,
    StorageOption,
    StrictOption,
    UntilOption,
    WaitOption,
    answer_stream,
    print_errors,
    print_json,
    run_request,
    site_of,
)


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
    from pipeline.config.graph import pipeline_graph
    from pipeline.progress import Display
    from pipeline.running.runner import run_pipeline

    request = run_request(config, site, storage, overrides, force, until, wait, strict_code)
    with answer_stream(as_json) as (stream, answer), Display(stream) as display:
        result = run_pipeline(request, pipeline_graph(), display)
    if result.message:
        print_errors(result.message)
    if as_json:
        print_json(answer, {"run": result.run, "state": result.state, "storage": result.storage})
    sys.exit(result.exit_code)


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
    from pipeline.config.graph import pipeline_graph
    from pipeline.running.submit import job_text, open_request, submit
    from pipeline.storage.lease import LeaseHeld

    request, graph = (
        run_request(config, site, storage, overrides, force, until, wait, strict_code),
        pipeline_graph(),
    )
    if only_print:
        typer.echo(job_text(request, open_request(request, graph)).shown(request.site))
        return
    try:
        submitted = submit(request, graph)
    except LeaseHeld as held:
        print_errors(str(held))
        sys.exit(1)
    if as_json:
        answer = {"run": submitted.run, "state": submitted.state, "storage": submitted.storage}
        print_json(sys.stdout, {**answer, "submission": submitted.submission})
    else:
        typer.echo(submitted.message)


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
    from pipeline.commands.tables import console, plan_table
    from pipeline.config.graph import pipeline_graph
    from pipeline.planning.estimates import expectations
    from pipeline.planning.request import open_pipeline

    request = run_request(config, site, storage, overrides, force, until, strict_code=strict_code)
    opened = open_pipeline(request, pipeline_graph())
    expected = expectations(opened, request.site)
    if as_json:
        known = {stage: one.as_json() for stage, one in expected.items()}
        print_json(
            sys.stdout, [{**one.as_json(), "expected": known.get(one.stage)} for one in opened.planned]
        )
    else:
        console().print(plan_table(opened.planned, expected))


def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Id, beginning of an id, or `latest`.")
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs, newest first, or show the stages of one."""
    from pipeline.commands.tables import console, run_details, run_summary, runs_table, stages_table
    from pipeline.results.runs import Runs
    from pipeline.running.jobs import as_job_stands

    where = site_of(site, storage)
    runs = Runs(where.storage)
    if run is None:
        found = [as_job_stands(one) for one in runs.all()]
        if as_json:
            print_json(sys.stdout, [run_summary(one) for one in found])
        elif found:
            console().print(runs_table(found))
        else:
            console().print(f"no runs in {where.storage_address}", markup=False)
        return
    one = as_job_stands(runs.named(run))
    if as_json:
        print_json(sys.stdout, run_details(one, where))
        return
    console().print(f"run {one.run}: {one.state}" + (f" ({one.error})" if one.error else ""), markup=False)
    console().print(stages_table(one, where))


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
    from pipeline.explain.logs import log_lines
    from pipeline.results.runs import Runs

    for line in log_lines(Runs(site_of(site, storage).storage), run, stage=stage, follow=follow):
        typer.echo(line)
