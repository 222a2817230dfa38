"""`vico status --watch`: one run on the terminal, drawn again until it ends."""

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.site import Site
from pipeline.commands.run_tables import run_state, stages_table
from pipeline.results.runs import ENDED, RunFile, Runs
from pipeline.running.jobs import with_job_state
from vico.errors import UserError, one_line

_EVERY_S = 2.0


def watch(name: str, site: Site) -> None:
    """Show the run and its stages until it ends. On a terminal the same lines are drawn again.

    Without a terminal the run is printed whenever something has changed. Raises UserError for a name that is
    no run.
    """
    runs = Runs(site.storage)
    run = runs.named(name).run  # `latest` stays the run that it was
    console = Console(highlight=False)
    if not console.is_terminal:
        _print_changes(runs, run, site, console)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            shown = _current(runs, run)
            live.update(run_view(shown, site), refresh=True)
            if shown.state in ENDED:
                return
            time.sleep(_EVERY_S)


def run_view(run: RunFile, site: Site) -> RenderableType:
    """Return a line about the run above the table of its stages."""
    return Group(Text(run_line(run)), stages_table(run, site))


def run_line(run: RunFile) -> str:
    """Return the state of a run, with the reason of its end."""
    error = f" ({one_line(run.error)})" if run.error else ""
    return f"run {run.run}: {run_state(run)}{error}"


def _current(runs: Runs, name: str) -> RunFile:
    runs.storage.refresh(runs.run_folder(name))
    return with_job_state(runs.named(name))


def _print_changes(runs: Runs, name: str, site: Site, console: Console) -> None:
    last = ""
    while True:
        run = _current(runs, name)
        with console.capture() as capture:
            console.print(run_view(run, site))
        if capture.get() != last:
            last = capture.get()
            console.out(last, end="")
        if run.state in ENDED:
            return
        time.sleep(_EVERY_S)


def refuse_watch(run: str | None, *, as_json: bool) -> None:
    """Raise UserError for options of `vico status` that --watch has no use for."""
    if run is None:
        raise UserError("--watch shows one run; name it, or give `latest`")
    if as_json:
        raise UserError("--watch draws for people; leave out --json, or --watch")
