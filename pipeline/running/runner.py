"""`vico run`: plan the stages, find or create the run, let its driver work on it, and return how it ended.

After a crash at any point the same command resumes: results are in the store, whichever run made them.
"""

from cluster.site import Site
from pipeline.config.graph import Graph
from pipeline.planning.estimates import check_memory
from pipeline.planning.request import OpenPipeline, RunRequest, open_pipeline
from pipeline.results.latest import link_results
from pipeline.results.run_summary import summary_lines
from pipeline.results.runs import RunFile, Runs
from pipeline.running.driver import Driver
from pipeline.running.held_run import HeldRun
from pipeline.running.jobs import in_job, refuse_other_code
from pipeline.running.preflight import (
    check_free_space,
    check_gpus,
    check_kind,
    check_ports,
    check_storage,
)
from pipeline.running.run_choice import choose_run
from pipeline.running.run_command import RunCommand, RunResult
from pipeline.running.services import send_missing
from pipeline.running.signals import StopSignals
from pipeline.running.stage_context import logging_to
from pipeline.storage.leases import LeaseHeld, Leases
from pipeline.storage.lookup import storage_of
from pipeline.terminal.progress import Display
from pipeline.tracking.sent import mark_incomplete


def run_pipeline(request: RunRequest, graph: Graph, display: Display) -> RunResult:
    """Run or resume the pipeline. Raises UserError before anything is started; after that, every end is a
    RunResult."""
    refuse_other_code()
    with StopSignals(only_first=in_job()) as signals:
        while True:
            opened = open_pipeline(request, graph, display.line)
            opened.check_can_run()
            check_kind(request.site)
            check_storage(request.site.storage)
            if not opened.is_done:
                check_free_space(request.site.storage, opened)
                check_ports(request.site, opened)
                check_gpus(request.site, opened)
                check_memory(opened, request.site)
            opened.cache.save()
            result = _work_on_run(RunCommand(request, opened, signals, display))
            if result is not None:
                return result
            storage_of(request.site.storage).refresh()


def _work_on_run(command: RunCommand) -> RunResult | None:
    """Choose a run, hold its lease and work on it. None: another command finished the run in the meantime, so
    plan again."""
    site, opened, display = command.site, command.opened, command.display
    runs = Runs(site.storage)
    chosen = choose_run(opened, site, runs)
    if chosen is None:
        return None
    accepts = command.request.accept and not chosen.accepted
    if chosen.state == "done" and all(entry.reused for entry in chosen.stages.values()) and not accepts:
        return _already_done(chosen, command)
    folder = runs.run_folder(chosen.run)
    try:
        lease = Leases(runs.storage).acquire(
            folder,
            chosen.run,
            wait_s=command.request.wait_s,
            on_wait=lambda holder: display.line(
                f"run {chosen.run}: waiting for its driver on {holder.host}, pid {holder.pid}"
            ),
        )
    except LeaseHeld as held:
        return RunResult(chosen.run, "running", site.storage_address, 1, str(held))
    with lease:
        with runs.locked():
            pass  # a `vico gc` that did not see this lease has ended, and a later one sees it
        runs.storage.refresh(folder)
        run = runs.named(chosen.run)
        if run.state != chosen.state and run.state in ("done", "cancelled"):
            return None
        if run.state == "done":
            _enter_reused(run, opened, site)
            if command.request.accept and not run.accepted:
                run.accepted = True
                mark_incomplete(folder, site)
            runs.save(run, lease)
            return _already_done(run, command)
        with runs.storage.sharing(folder, folder), logging_to(folder / "driver.log"):
            return Driver(command, HeldRun(runs, run, lease)).work()


def _enter_reused(run: RunFile, opened: OpenPipeline, site: Site) -> None:
    """Mark every stage of a run that was found done as reused."""
    for task in opened.pipeline.tasks:
        record = task.folder(site.storage).record()
        if record is None:
            raise RuntimeError(f"stage {task.name} lost its record after it was planned as done")
        run.stages[task.name].mark_reused(record)


def _already_done(run: RunFile, command: RunCommand) -> RunResult:
    """Return the result of a command that found everything done, after sending MLflow what it still lacks."""
    site, display = command.site, command.display
    for stage in command.opened.planned:
        display.line(f"{stage.stage}: reused, {'; '.join(stage.reasons)}")
    until = command.request.until
    display.line(f"run {run.run}: done" + ("" if until is None else f" until {until}"))
    link_results(run, site.storage)
    for line in summary_lines(run, site.storage, site.storage_address):
        display.line(line)
    send_missing(site, Runs(site.storage).run_folder(run.run), display)
    return RunResult(run.run, "done", site.storage_address)
