"""Commands that start runs and follow them."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

from pipeline.commands.options import (
    AcceptOption,
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
    site_file,
    site_of,
)
from pipeline.terminal.output import error_terminal, print_errors, print_json, terminal
from vico.errors import UserError

_ASKED_AT_ONCE = 16
"""Schedulers' answers that `vico status` waits for at the same time."""


def run(
    config: ConfigArgument,
    site: SiteOption = None,
    storage: StorageOption = None,
    overrides: SetOption = None,
    force: ForceOption = None,
    until: UntilOption = None,
    strict_code: StrictOption = False,
    accept: AcceptOption = False,
    wait: WaitOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Run or resume a pipeline.

    Finished stages are reused. After a crash or a stop, the same command resumes the run.
    """
    from pipeline.config.graph import pipeline_graph
    from pipeline.planning.request import RunRequest
    from pipeline.running.runner import run_pipeline
    from pipeline.terminal.progress import Display

    request = RunRequest(
        config,
        site_of(site, storage),
        overrides=tuple(overrides or ()),
        force=tuple(force or ()),
        until=until,
        wait_s=wait,
        accept=accept,
        strict_code=strict_code,
        site_file=site_file(site),
    )
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
    accept: AcceptOption = False,
    wait: WaitOption = 0.0,
    only_print: Annotated[
        bool, typer.Option("--print", help="Show the job; submit and write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a run as a job to the site's scheduler.

    `vico status`, `vico logs -f` and `vico cancel` follow and stop it.
    """
    from pipeline.config.graph import pipeline_graph
    from pipeline.planning.request import RunRequest
    from pipeline.storage.leases import LeaseHeld
    from pipeline.submission.submit import printed_job
    from pipeline.submission.submit import submit as submit_run

    graph = pipeline_graph()
    request = RunRequest(
        config,
        site_of(site, storage),
        overrides=tuple(overrides or ()),
        force=tuple(force or ()),
        until=until,
        wait_s=wait,
        accept=accept,
        strict_code=strict_code,
        site_file=site_file(site),
    )
    if only_print:
        terminal().lines(printed_job(request, graph))
        return
    try:
        submitted = submit_run(request, graph)
    except LeaseHeld as held:
        print_errors(str(held))
        sys.exit(1)
    if as_json:
        answer = {"run": submitted.run, "state": submitted.state, "storage": submitted.storage}
        print_json(sys.stdout, {**answer, "submission": submitted.submission})
    else:
        terminal().line(submitted.message)


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
    """Show which stages would run, and why.

    For each stage that would run it also shows time, storage and memory, if they are known. If the model's
    weights are not here, its config.json alone is read. Exits with 2 if a training would not fit the GPUs
    that the site states. Writes nothing.
    """
    from pipeline.commands.run_tables import plan_table
    from pipeline.config.graph import pipeline_graph
    from pipeline.planning.estimates import stage_estimates
    from pipeline.planning.request import RunRequest, open_pipeline
    from pipeline.planning.without_weights import plan_without_weights

    request = RunRequest(
        config,
        site_of(site, storage),
        overrides=tuple(overrides or ()),
        force=tuple(force or ()),
        until=until,
        strict_code=strict_code,
    )
    without_weights = plan_without_weights(request, pipeline_graph())
    if without_weights is None:
        opened = open_pipeline(request, pipeline_graph(), error_terminal().line)
        planned, estimates = opened.planned, stage_estimates(opened, request.site)
    else:
        planned, estimates = without_weights.planned, without_weights.estimates
        error_terminal().line(without_weights.note)
    if as_json:
        expected = {stage: estimate.as_json() for stage, estimate in estimates.items()}
        rows = [{**stage.as_json(), "expected": expected.get(stage.stage)} for stage in planned]
        print_json(sys.stdout, rows)
    else:
        terminal().table(plan_table(planned, estimates))
    refusals = [estimate.refusal for estimate in estimates.values() if estimate.refusal]
    if refusals:
        raise UserError("\n".join(refusals))


def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="The run's id, a unique prefix of it, or `latest`; default: all runs."
        ),
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Draw the run again every two seconds until it ends.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List all runs, newest first, or show the stages of one run."""
    from pipeline.commands.run_tables import run_view, runs_view
    from pipeline.commands.tables import run_details, run_summary
    from pipeline.commands.watch import refuse_watch
    from pipeline.commands.watch import watch as watch_run
    from pipeline.results.runs import Runs
    from pipeline.running.jobs import with_job_state

    if watch:
        refuse_watch(run, as_json=as_json)
    opened_site = site_of(site, storage)
    if watch and run is not None:
        watch_run(run, opened_site)
        return
    runs = Runs(opened_site.storage)
    if run is None:
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:  # a scheduler may take a second for each
            current = list(pool.map(with_job_state, runs.all()))
        if as_json:
            print_json(sys.stdout, [run_summary(run_file) for run_file in current])
        elif current:
            terminal().view(runs_view(current))
        else:
            terminal().line(f"no runs in {opened_site.storage_address}")
        return
    shown = with_job_state(runs.named(run))
    if as_json:
        print_json(sys.stdout, run_details(shown, opened_site))
        return
    terminal().view(run_view(shown, opened_site))


def logs(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue with new lines until the run ends.")
    ] = False,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="Show the logs of this stage's driver and ranks instead."),
    ] = None,
    job: Annotated[
        bool, typer.Option("--job", help="Show what the run's job printed, by its scheduler, instead.")
    ] = False,
    start_timeout: Annotated[
        float | None,
        typer.Option(
            "--start-timeout",
            metavar="SECONDS",
            min=0,
            help="With -f: give up after this time on a job that still waits, with the scheduler's reason.",
        ),
    ] = None,
    site: SiteOption = None,
    storage: StorageOption = None,
) -> None:
    """Print the log of a run."""
    from pipeline.explain.logs import job_log, log_lines
    from pipeline.results.runs import Runs

    runs = Runs(site_of(site, storage).storage)
    if job and (follow or stage is not None):
        raise UserError("--job shows the job's output so far; leave out --follow and --stage")
    if start_timeout is not None and not follow:
        raise UserError(f"--start-timeout={start_timeout:g} has no effect without --follow")
    if job:
        terminal().lines(job_log(runs, run).rstrip("\n"))
        return
    lines = log_lines(runs, run, stage=stage, follow=follow, start_timeout_s=start_timeout)
    for line in lines:
        terminal().lines(line)


def cancel(run: RunArgument, site: SiteOption = None, storage: StorageOption = None) -> None:
    """Stop the job of a submitted run.

    The driver publishes a checkpoint if it can; nothing of the job is left running. Results stay.
    """
    from pipeline.results.runs import Runs
    from pipeline.submission.submit import cancel as cancel_run

    terminal().lines(cancel_run(Runs(site_of(site, storage).storage), run))
