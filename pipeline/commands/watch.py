"""`vico status --watch`: one run on the terminal, drawn again until it ends."""

import sys
import time

from cluster.site import Site
from pipeline.commands.run_tables import run_view
from pipeline.results.runs import ENDED, RunFile, Runs
from pipeline.running.jobs import DriverEnd, with_job_state
from pipeline.terminal.live import LiveView
from vico.errors import UserError

_EVERY_S = 2.0


def watch(name: str, site: Site) -> None:
    """Show the run and its stages until it has ended and its driver has let go of it. On a terminal the same
    lines are drawn again.

    Without a terminal the run is printed whenever something has changed. Raises UserError for a name that is
    no run.
    """
    runs = Runs(site.storage)
    run = runs.named(name).run  # `latest` stays the run that it was
    driver_end = DriverEnd(runs.run_folder(run))
    with LiveView(sys.stdout) as live:
        while True:
            shown = _current(runs, run)
            live.show(run_view(shown, site))
            if shown.state in ENDED and driver_end.has_come():
                return
            time.sleep(_EVERY_S)


def _current(runs: Runs, name: str) -> RunFile:
    runs.storage.refresh(runs.run_folder(name))
    return with_job_state(runs.named(name))


def refuse_watch(run: str | None, *, as_json: bool) -> None:
    """Raise UserError for options of `vico status` that --watch has no use for."""
    if run is None:
        raise UserError("--watch shows one run; name it, or give `latest`")
    if as_json:
        raise UserError("--watch draws for people; leave out --json, or --watch")
