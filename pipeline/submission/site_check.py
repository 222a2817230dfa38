"""`vico site check`: run the checks of a site where its runs work: here, or in a small job."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import yaml

from cluster.launchers.by_kind import launcher_of
from cluster.launchers.launcher import Job, JobStatus, Launcher
from cluster.site import Site
from cluster.site_checks.report import CheckResult, failed, passed, results_in_log
from pipeline.running.preflight import check_storage
from pipeline.submission.submit import SITE_FILE, code_files, new_submission, refuse_passwords
from vico.errors import UserError, last_line

_POLL_S = 2.0
VERSIONS_FILE = "submitted/versions.json"
"""Versions of the submitting machine, beside the site that the job reads."""


def site_results(
    site: Site, *, with_job: bool, timeout_s: float, say: Callable[[str], None]
) -> list[CheckResult]:
    """Return the results of all checks. `say` gets lines about the job's progress.

    A site whose nodes exist only in jobs, or whose cluster this machine reaches only by HTTP, is checked by a
    job; without one (`with_job` false) only reachability and storage are.
    """
    results = [_storage_here(site)]
    if not _needs_job(site):
        from cluster.site_checks.run import check_site

        return [*results, *check_site(site)]
    try:
        refuse_passwords(site)
        launcher = launcher_of(_with_a_log(site))
        launcher.check()
    except UserError as error:
        return [*results, failed("scheduler", str(error), "see the message")]
    results.append(passed("scheduler", f"it answers, kind {site.kind}"))
    if not with_job:
        return results
    return [*results, *_results_of_job(site, launcher, timeout_s, say)]


def _with_a_log(site: Site) -> Site:
    """Return the site with KubeRay's submitter pod, whose log has the results after the cluster is gone."""
    mode = {"submission_mode": "K8sJobMode"}
    return site.model_copy(update={"kuberay": site.kuberay.model_copy(update=mode)})


def results_in_job(site: Site) -> list[CheckResult]:
    """Return the results of the checks from inside the job, whose folder has the submitting machine's
    versions."""
    from cluster.site_checks.run import check_site

    file = Path(VERSIONS_FILE)
    return check_site(site, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None)


def _needs_job(site: Site) -> bool:
    return site.kind in ("kuberay", "slurm") or (site.kind == "ray" and site.ray.address is None)


def _storage_here(site: Site) -> CheckResult:
    try:
        check_storage(site.storage)
    except UserError as error:
        return failed("storage here", str(error), "see the message")
    return passed("storage here", f"{site.storage_address} is writable from this machine")


def _results_of_job(
    site: Site, launcher: Launcher, timeout_s: float, say: Callable[[str], None]
) -> list[CheckResult]:
    """Submit a job that checks the site from inside, and return what it found."""
    from cluster.site_checks.nodes import versions_here

    files = {SITE_FILE: yaml.safe_dump(site.in_job().as_given(), sort_keys=False, allow_unicode=True)}
    files[VERSIONS_FILE] = json.dumps(versions_here())
    if site.jobs.code == "archive":
        files |= code_files()
    name = f"vico-check-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    job = Job(name, ("site", "check", SITE_FILE, "--in-job"), files, new_submission(launcher, site, name))
    try:
        say(f"job {name}: submitted {launcher.submit(job)}")
    except UserError as error:
        return [failed("scheduler", str(error), "see the message")]
    try:
        results = _awaited(launcher, name, timeout_s, say)
    except BaseException:  # also Ctrl-C: nothing is left running
        with suppress(UserError):
            launcher.cancel(name)
        raise
    try:
        launcher.cancel(name)
    except UserError as error:
        results.append(failed("job", f"job {name} may be left: {error}", "cancel it by its scheduler"))
    return results


def _awaited(
    launcher: Launcher, name: str, timeout_s: float, say: Callable[[str], None]
) -> list[CheckResult]:
    deadline, shown = time.monotonic() + timeout_s, ""
    while True:
        status = launcher.status(name)
        found = results_in_log(launcher.logs(name)) if status.state != "pending" else None
        if found is not None:
            return found
        line = f"job {name}: {status.state}" + (f": {status.message}" if status.message else "")
        if line != shown:
            say(line)
        shown = line
        if status.state in ("done", "failed", "cancelled"):
            return [_without_result(launcher, name, status)]
        if time.monotonic() > deadline:
            reason = status.message or "no reason given"
            detail = f"job {name} is {status.state} after {timeout_s:g} s: {reason}"
            remedy = (
                "wait longer with --timeout, ask for less, or ask the cluster's operators about the reason"
            )
            return [failed("job", detail, remedy)]
        time.sleep(_POLL_S)


def _without_result(launcher: Launcher, name: str, status: JobStatus) -> CheckResult:
    reason = status.message or last_line(launcher.logs(name)) or "it printed nothing"
    remedy = "correct jobs.python, slurm.setup or kuberay.image, so that vico starts on the nodes"
    return failed("job", f"job {name} {status.state} without a result: {reason}", remedy)
