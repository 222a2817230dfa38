"""`vico submit` and `vico cancel`: enter a run as pending and send the command that works on it to the
site."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from cluster.launchers.by_kind import launcher_of, launcher_of_submission
from cluster.launchers.launcher import Job, Launcher
from cluster.passwords import password_fields
from cluster.settings.yaml_files import yaml_text
from cluster.site import Site
from cluster.sources.driver import driver_code
from pipeline.config.graph import Graph
from pipeline.identity.provenance import PACKAGED_GIT_FILE, PACKAGED_PATCH_FILE, git_patch, git_state
from pipeline.planning.estimates import check_memory
from pipeline.planning.request import OpenPipeline, RunRequest, open_pipeline
from pipeline.results.runs import RunFile, Runs, State
from pipeline.running.held_run import forget_forced
from pipeline.running.jobs import is_job, job_status
from pipeline.running.preflight import check_storage
from pipeline.running.run_choice import choose_run
from pipeline.storage.leases import Leases
from vico.errors import UserError, one_line

CONFIG_FILE, SITE_FILE = "submitted/config.yaml", "submitted/site.yaml"
_END_TIMEOUT_S = 660.0
"""Longer than any launcher gives the ranks to publish a checkpoint."""


@dataclass(frozen=True)
class Submitted:
    """A run and the job that works on it. `submission` is None if the run was done already."""

    run: str
    state: State
    storage: str
    message: str
    submission: dict[str, Any] | None = None


def job_of(request: RunRequest, opened: OpenPipeline, name: str, submission: Mapping[str, Any]) -> Job:
    """Return the job that runs what `vico run` would run here: paths are absolute, overrides applied."""
    config = yaml_text(opened.pipeline.config.resolved())
    site = yaml.safe_dump(request.site.in_job().as_given(), sort_keys=False, allow_unicode=True)
    files = {CONFIG_FILE: config, SITE_FILE: site}
    if request.site.jobs.code == "archive":
        files |= code_files()
    return Job(name, _arguments(request), files, submission)


def code_files() -> dict[str, str]:
    """Return the files that tell a job which commit its archive of sources comes from."""
    patch = git_patch()
    files = {PACKAGED_GIT_FILE: json.dumps(git_state())}
    return files if patch is None else {**files, PACKAGED_PATCH_FILE: patch}


def _arguments(request: RunRequest) -> tuple[str, ...]:
    arguments = ["run", CONFIG_FILE, "--site", SITE_FILE]
    for stage in request.force:
        arguments += ["--force", stage]
    if request.strict_code:
        arguments.append("--strict-code")
    if request.accept:
        arguments.append("--accept")
    if request.until:
        arguments += ["--until", request.until]
    if request.wait_s:
        arguments += ["--wait", str(request.wait_s)]
    return tuple(arguments)


def printed_job(request: RunRequest, graph: Graph) -> str:
    """Return the job of `vico submit --print`. Its name is that of a run which does not exist yet."""
    opened = open_request(request, graph)
    launcher = launcher_of(request.site)
    return launcher.render(job_of(request, opened, "vico-run", {}))


def open_request(request: RunRequest, graph: Graph) -> OpenPipeline:
    """Read and check the request as `vico run` does.

    Raises UserError, also if the site has a password, because the job would keep it.
    """
    refuse_passwords(request.site)
    opened = open_pipeline(request, graph)
    opened.check_can_run()
    check_memory(opened, request.site)
    return opened


def refuse_passwords(site: Site) -> None:
    """Raise UserError if the site has a password, because a job would keep it."""
    fields = password_fields(site.model_dump(mode="json"))
    if fields:
        raise UserError(
            f"{fields[0]} (site {site.name}) holds a password, which the job would keep; take it out, and "
            "set MLFLOW_TRACKING_USERNAME and _PASSWORD in the cluster's environment (kind kuberay: "
            "kuberay.secrets)"
        )


def submit(request: RunRequest, graph: Graph) -> Submitted:
    """Enter the run as pending and send its job to the site.

    Raises UserError before anything is written, and LeaseHeld when a driver works on the run. However it ends
    early, no job is left behind.
    """
    site = request.site
    launcher = launcher_of(site)
    opened = open_request(request, graph)
    launcher.check()
    check_storage(site.storage)
    runs = Runs(site.storage)
    while (run := choose_run(opened, site, runs)) is None:
        runs.storage.refresh()
        opened = open_request(request, graph)
    address = site.storage_address
    if run.state == "done":
        return Submitted(run.run, "done", address, f"run {run.run} is done; there is nothing to submit")
    if (
        run.submission is not None
        and is_job(run.submission)
        and job_status(run.submission).state in ("pending", "running")
    ):
        message = (
            f"run {run.run} is with its job {run.submission['id']} already; vico status {run.run} shows it"
        )
        return Submitted(run.run, run.state, address, message, run.submission)
    submission = new_submission(launcher, site, f"vico-{run.run}-{secrets.token_hex(2)}")
    job = job_of(request, opened, submission["id"], submission)
    _enter(runs, run.run, submission, site_file=request.site_file)
    try:
        where = launcher.submit(job)
    except BaseException as error:  # also Ctrl-C: the launcher has taken the job back
        _enter(runs, run.run, None, f"not submitted: {one_line(error)}")
        raise
    follow = f"vico logs -f {run.run} --storage {address}"
    message = f"run {run.run}: submitted {where}, job {job.name}; {follow} follows it"
    return Submitted(run.run, "pending", address, message, submission)


def new_submission(launcher: Launcher, site: Site, name: str) -> dict[str, Any]:
    """Return what is recorded about a job: how to reach it, and the digest of the code that it brings."""
    return {
        "kind": launcher.kind,
        **launcher.place(),
        "id": name,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": driver_code()["digest"] if site.jobs.code == "archive" else None,
    }


def cancel(runs: Runs, name: str) -> str:
    """Stop the job of a run and wait until it is gone; return a line about it.

    Raises UserError if the run was not submitted, or its scheduler does not answer.
    """
    run = runs.named(name)
    submission = run.submission
    if submission is None or not is_job(submission):
        raise UserError(
            f"RUN={run.run} was not submitted; stop its driver where it works (Ctrl-C, or SIGTERM to "
            f"its process)"
        )
    if run.state == "done":  # its driver may need a moment more to end
        return f"run {run.run}: done; nothing to cancel"
    status = job_status(submission)
    if status.state == "unknown":
        raise UserError(f"RUN={run.run}: its job cannot be cancelled: {status.message}")
    was_active = launcher_of_submission(submission).cancel(submission["id"])
    _wait_until_ended(run, submission)
    if not was_active:
        return f"run {run.run}: its job {submission['id']} had ended ({status.state}); nothing to cancel"
    run = runs.named(run.run)
    if run.state == "pending":
        _enter(runs, run.run, submission, "its job was cancelled before it started", state="cancelled")
    return f"run {run.run}: its job {submission['id']} is cancelled; the same `vico submit` resumes the run"


def _wait_until_ended(run: RunFile, submission: dict[str, Any]) -> None:
    """Wait until the scheduler says that a cancelled job has ended: until then, `submit` would leave the run
    with it. Raises UserError after `_END_TIMEOUT_S`."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while job_status(submission).state in ("pending", "running"):
        if time.monotonic() > deadline:
            raise UserError(
                f"RUN={run.run}: its job {submission['id']} was told to stop and has not ended after "
                f"{_END_TIMEOUT_S:g} s; see vico logs --job {run.run}, and cancel it again"
            )
        time.sleep(0.5)


def _enter(
    runs: Runs,
    name: str,
    submission: dict[str, Any] | None,
    error: str | None = None,
    *,
    site_file: str | None = None,
    state: State = "failed",
) -> None:
    """Write the submission into run.json under the run's lease; raises LeaseHeld if a driver holds it."""
    with Leases(runs.storage).acquire(runs.run_folder(name), name) as lease:
        run = runs.named(name)
        forget_forced(run)
        run.submission, run.error, run.site_file = submission, error, site_file or run.site_file
        run.state = "pending" if error is None else state
        runs.save(run, lease)
