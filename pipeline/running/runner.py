"""`vico run`: finds or makes the run, has its driver work on it, and says how it ended.

A crash at any point is mended by the same command: results lie in the store, whoever made them.
"""

from cluster.site import Site
from pipeline.config.graph import Graph
from pipeline.planning.request import OpenPipeline, RunRequest, open_pipeline
from pipeline.progress import Display
from pipeline.results.runs import RunFile, Runs
from pipeline.running.driver import Driver, RunResult
from pipeline.running.preflight import check_free_space, check_ports, check_storage
from pipeline.running.run_choice import choose_run
from pipeline.running.signals import StopSignals
from pipeline.running.stage_context import logging_to
from pipeline.storage.lease import LeaseHeld, Leases
from pipeline.storage.lookup import storage_of
from pipeline.tracking.sent import STATE_FILE, is_complete
from vico.errors import UserError


def run_pipeline(request: RunRequest, graph: Graph, display: Display) -> RunResult:
    """Run the pipeline or go on with it; raises UserError before anything is started, later every end is a
    RunResult."""
    with StopSignals() as signals:
        while True:
            opened = open_pipeline(request, graph)
            refused = [one.refused for one in opened.planned if one.refused]
            if refused:
                raise UserError("\n".join(refused))
            check_storage(request.site.storage)
            if not opened.is_done:
                check_free_space(request.site.storage, opened.planned)
                check_ports(request.site, opened.pipeline, opened.planned)
            opened.cache.save()
            result = _with_run(request, opened, signals, display)
            if result is not None:
                return result
            storage_of(request.site.storage).refresh()


def _with_run(
    request: RunRequest, opened: OpenPipeline, signals: StopSignals, display: Display
) -> RunResult | None:
    """Work on the chosen run; None when another command finished it meanwhile, so that it must be chosen
    again."""
    storage = request.site.storage
    runs = Runs(storage)
    run = choose_run(opened, request.site, runs)
    if run is None:
        return None
    if run.state == "done" and all(entry.reused for entry in run.stages.values()):
        return _finished(run, request.site, opened, display)
    try:
        lease = Leases(runs.storage).acquire(
            runs.run_folder(run.run),
            run.run,
            wait_s=request.wait_s,
            on_wait=lambda holder: display.line(
                f"run {run.run}: waiting for its driver on {holder.host}, pid {holder.pid}"
            ),
        )
    except LeaseHeld as held:
        return RunResult(run.run, "running", request.site.storage_address, 1, str(held))
    with lease:
        runs.storage.refresh(runs.run_folder(run.run))
        now = runs.named(run.run)
        if now.state != run.state and now.state in ("done", "cancelled"):
            return None
        if now.state == "done":
            for task in opened.pipeline.tasks:
                now.stages[task.name].enter_reused(task.folder(storage).record())
            runs.save(now, lease)
            return _finished(now, request.site, opened, display)
        driver = Driver(request, opened, runs, now, lease, signals, display)
        folder = runs.run_folder(run.run)
        with runs.storage.attending(folder, folder), logging_to(folder / "driver.log"):
            return driver.work()


def _finished(run: RunFile, site: Site, opened: OpenPipeline, display: Display) -> RunResult:
    """The result of a command that found everything done; tracking is told what an outage kept from it."""
    for one in opened.planned:
        display.line(f"{one.stage}: reused, {'; '.join(one.reasons)}")
    display.line(f"run {run.run}: done")
    folder = Runs(site.storage).run_folder(run.run)
    if site.tracking.enabled and (folder / STATE_FILE).exists() and not is_complete(folder, site):
        from pipeline.tracking.thread import sync

        display.line(sync(site, folder) or f"run {run.run}: tracking has all of it now")
    return RunResult(run.run, "done", site.storage_address)
