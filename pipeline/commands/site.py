"""Commands about sites."""

import sys
from typing import Annotated

import typer

from pipeline.commands.options import JsonOption, StorageOption, answer_stream, site_of
from pipeline.terminal.output import Terminal, error_terminal, print_json, terminal


def check(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Site file, or the name of one in sites/.")],
    no_job: Annotated[
        bool, typer.Option("--no-job", help="Only check what can be checked without a job.")
    ] = False,
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", min=1, help="Longest time for the check's job."),
    ] = 900.0,
    in_job: Annotated[bool, typer.Option("--in-job", hidden=True)] = False,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a site before anything is submitted to it.

    Asks every node for versions, code, GPUs, storage, clock and free disk, MLflow for an answer, and measures
    an all-reduce. Exit code 1: a check failed.
    """
    from cluster.site_checks.report import log_line
    from pipeline.commands.tables import checks_table

    opened_site = site_of(site, storage)
    if in_job:
        from pipeline.submission.site_check import results_in_job

        results = results_in_job(opened_site)
        terminal().lines(log_line(results))
        return
    from pipeline.submission.site_check import site_results

    with answer_stream(as_json) as (stream, answer):
        results = site_results(
            opened_site,
            with_job=not no_job,
            timeout_s=timeout,
            say=(Terminal(stream) if as_json else error_terminal()).line,
        )
        if as_json:
            print_json(answer, [result.as_json() for result in results])
        else:
            terminal().table(checks_table(results))
    sys.exit(1 if any(result.state == "failed" for result in results) else 0)
