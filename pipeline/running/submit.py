"""`vico submit`: enter a run as pending, and submit the command that works on it to a Ray Jobs server."""

import json
import os
import secrets
import shlex
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from cluster.jobs import JobServer, write_package
from cluster.passwords import password_fields
from cluster.site import Site
from cluster.sources.driver import driver_code
from pipeline.config.graph import Graph
from pipeline.identity.provenance import PACKAGED_GIT_FILE, PACKAGED_PATCH_FILE, git_patch, git_state
from pipeline.planning.request import OpenPipeline, RunRequest, open_pipeline
from pipeline.results.runs import Runs, State
from pipeline.running.held_run import forget_forced
from pipeline.running.jobs import JOB_VARIABLE, KIND, job_status
from pipeline.running.preflight import check_storage
from pipeline.running.run_choice import choose_run
from pipeline.storage.leases import Leases
from vico.errors import UserError

CONFIG_FILE, SITE_FILE = "submitted/config.yaml", "submitted/site.yaml"


@dataclass(frozen=True)
class Submitted:
    """A run and the job that works on it. `submission` is None if the run was done already."""

    run: str
    state: State
    storage: str
    message: str
    submission: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobText:
    """What the server gets: a command, files packed beside the project's sources, and the environment."""

    entrypoint: str
    files: dict[str, str]
    """Path in the package -> content."""
    env_vars: dict[str, str]

    def shown(self, site: Site) -> str:
        """Return the text for `--print`."""
        runtime_env = {"working_dir": "PACKAGE.zip", "env_vars": self.env_vars}
        parts = [
            f"# to {site.jobs.address or 'jobs.address, which is not set in this site'}",
            yaml.safe_dump({"entrypoint": self.entrypoint, "runtime_env": runtime_env}, width=1000).rstrip(),
            *(f"# PACKAGE.zip/{name}\n{text.rstrip()}" for name, text in self.files.items()),
        ]
        return "\n\n".join(parts)


def job_text(request: RunRequest, opened: OpenPipeline) -> JobText:
    """Return the job that runs what `vico run` would run here: paths are absolute, overrides applied."""
    site = request.site.as_given()
    site["ray"]["address"] = "auto"  # the job's own cluster, which Ray names in RAY_ADDRESS
    config = yaml.safe_dump(opened.pipeline.config.resolved(), sort_keys=False, allow_unicode=True)
    files = {
        CONFIG_FILE: config,
        SITE_FILE: yaml.safe_dump(site, sort_keys=False, allow_unicode=True),
        PACKAGED_GIT_FILE: json.dumps(git_state()),
    }
    patch = git_patch()
    if patch is not None:
        files[PACKAGED_PATCH_FILE] = patch
    return JobText(shlex.join(_command(request)), files, {"PYTHONUNBUFFERED": "1"})


def _command(request: RunRequest) -> list[str]:
    command = [request.site.jobs.python, "-m", "pipeline.cli", "run", CONFIG_FILE, "--site", SITE_FILE]
    for stage in request.force:
        command += ["--force", stage]
    if request.strict_code:
        command.append("--strict-code")
    if request.accept:
        command.append("--accept")
    if request.until:
        command += ["--until", request.until]
    if request.wait_s:
        command += ["--wait", str(request.wait_s)]
    return command


def open_request(request: RunRequest, graph: Graph) -> OpenPipeline:
    """Read and check the request as `vico run` does.

    Raises UserError, also if the site has a password, because the job's package would keep it.
    """
    fields = password_fields(request.site.model_dump(mode="json"))
    if fields:
        raise UserError(
            f"{fields[0]} (site {request.site.name}) holds a password, which the job's package would keep; "
            "take it out, and set MLFLOW_TRACKING_USERNAME and _PASSWORD in the cluster's environment"
        )
    opened = open_pipeline(request, graph)
    opened.check_can_run()
    return opened


def submit(request: RunRequest, graph: Graph) -> Submitted:
    """Enter the run as pending and send its job to the site's server.

    Raises UserError before anything is written, and LeaseHeld when a driver works on the run.
    """
    site = request.site
    if site.jobs.address is None:
        raise UserError(
            f"jobs.address is not set in site {site.name}; give the Ray Jobs server's http://HOST:8265"
        )
    opened = open_request(request, graph)
    server = JobServer(site.jobs.address)
    check_storage(site.storage)
    runs = Runs(site.storage)
    while (run := choose_run(opened, site, runs)) is None:
        runs.storage.refresh()
        opened = open_request(request, graph)
    address = site.storage_address
    if run.state == "done":
        return Submitted(run.run, "done", address, f"run {run.run} is done; there is nothing to submit")
    if run.submission and job_status(run.submission).state in ("pending", "running"):
        message = f"run {run.run} is with {run.submission['address']} already, job {run.submission['id']}"
        return Submitted(run.run, run.state, address, message, run.submission)
    submission = {
        "kind": KIND,
        "address": site.jobs.address,
        "id": f"vico-{run.run}-{secrets.token_hex(2)}",
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": driver_code()["digest"],
    }
    _enter(runs, run.run, submission, site_file=request.site_file)
    try:
        package_bytes = _send(server, job_text(request, opened), submission)
    except Exception as error:
        _enter(runs, run.run, None, f"not submitted: {error}")
        raise
    message = (
        f"run {run.run}: submitted to {site.jobs.address} as job {submission['id']} "
        f"({package_bytes / 1000:.0f} kB of sources); vico logs -f {run.run} --storage {address} follows it"
    )
    return Submitted(run.run, "pending", address, message, submission)


def _send(server: JobServer, text: JobText, submission: dict[str, Any]) -> int:
    """Pack the project and submit the job; return the bytes of the package."""
    with tempfile.TemporaryDirectory(prefix="vico-submit-") as folder:
        package = Path(folder, "package.zip")
        write_package(package, text.files)
        env_vars = {**text.env_vars, JOB_VARIABLE: json.dumps(submission)}
        runtime_env = {"working_dir": str(package), "env_vars": env_vars}
        server.submit(text.entrypoint, runtime_env, submission["id"])
        return os.path.getsize(package)


def _enter(
    runs: Runs,
    name: str,
    submission: dict[str, Any] | None,
    error: str | None = None,
    *,
    site_file: str | None = None,
) -> None:
    """Write the submission into run.json under the run's lease; raises LeaseHeld if a driver holds it."""
    with Leases(runs.storage).acquire(runs.run_folder(name), name) as lease:
        run = runs.named(name)
        forget_forced(run)
        run.submission, run.error, run.site_file = submission, error, site_file or run.site_file
        run.state = "pending" if error is None else "failed"
        runs.save(run, lease)
