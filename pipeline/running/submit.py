"""`vico submit`: a run is entered as pending, and a Ray Jobs server is given the command that works on it."""

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
from cluster.passwords import places_of_passwords
from cluster.site import Site
from pipeline.config.graph import Graph
from pipeline.identity.provenance import PACKAGED_GIT_FILE, PACKAGED_PATCH_FILE, git_patch, git_state
from pipeline.planning.request import OpenPipeline, RunRequest, open_pipeline
from pipeline.results.runs import Runs
from pipeline.running.jobs import JOB_VARIABLE, KIND, submission_state
from pipeline.running.preflight import check_storage
from pipeline.running.run_choice import choose_run
from pipeline.storage.lease import Leases
from vico.errors import UserError

CONFIG_FILE, SITE_FILE = "submitted/config.yaml", "submitted/site.yaml"


@dataclass(frozen=True)
class Submitted:
    """A run and the job that works on it; without a package when there was nothing to hand over."""

    run: str
    state: str
    storage: str
    message: str
    submission: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobText:
    """What the server is given: a command, the files packed beside the project, the environment."""

    entrypoint: str
    files: dict[str, str]
    env_vars: dict[str, str]

    def shown(self, site: Site) -> str:
        """For `--print`."""
        runtime_env = {"working_dir": "PACKAGE.zip", "env_vars": self.env_vars}
        parts = [
            f"# to {site.jobs.address or 'jobs.address, which is not set in this site'}",
            yaml.safe_dump({"entrypoint": self.entrypoint, "runtime_env": runtime_env}, width=1000).rstrip(),
            *(f"# PACKAGE.zip/{name}\n{text.rstrip()}" for name, text in self.files.items()),
        ]
        return "\n\n".join(parts)


def job_text(request: RunRequest, opened: OpenPipeline) -> JobText:
    """The job that runs what `vico run` would run here, with all paths absolute and overrides applied."""
    site = request.site.as_given()
    site["ray"]["address"] = "auto"  # the job's own cluster, which Ray names in RAY_ADDRESS
    command = [request.site.jobs.python, "-m", "pipeline.cli", "run", CONFIG_FILE, "--site", SITE_FILE]
    for stage in request.force:
        command += ["--force", stage]
    if request.strict_code:
        command.append("--strict-code")
    if request.until:
        command += ["--until", request.until]
    if request.wait_s:
        command += ["--wait", str(request.wait_s)]
    config = yaml.safe_dump(opened.pipeline.config.resolved(), sort_keys=False, allow_unicode=True)
    files = {
        CONFIG_FILE: config,
        SITE_FILE: yaml.safe_dump(site, sort_keys=False, allow_unicode=True),
        PACKAGED_GIT_FILE: json.dumps(git_state()),
    }
    patch = git_patch()
    if patch is not None:
        files[PACKAGED_PATCH_FILE] = patch
    return JobText(shlex.join(command), files, {"PYTHONUNBUFFERED": "1"})


def open_request(request: RunRequest, graph: Graph) -> OpenPipeline:
    """The request read and checked, as `vico run` does it. Raises UserError, also for a site whose passwords
    the job's package would keep.
    """
    secret = places_of_passwords(request.site.model_dump(mode="json"))
    if secret:
        raise UserError(
            f"{secret[0]} (site {request.site.name}) holds a password, which the job's package would keep; "
            "take it out, and set MLFLOW_TRACKING_USERNAME and _PASSWORD in the cluster's environment"
        )
    opened = open_pipeline(request, graph)
    refused = [one.refused for one in opened.planned if one.refused]
    if refused:
        raise UserError("\n".join(refused))
    return opened


def submit(request: RunRequest, graph: Graph) -> Submitted:
    """Enter the run and hand it to the site's server.

    Raises UserError before anything is written, and LeaseHeld when a driver works on the run.
    """
    site, storage = request.site, request.site.storage
    address = site.storage_address
    if site.jobs.address is None:
        raise UserError(
            f"jobs.address is not set in site {site.name}; give the Ray Jobs server's http://HOST:8265"
        )
    opened = open_request(request, graph)
    server = JobServer(site.jobs.address)
    check_storage(storage)
    runs = Runs(storage)
    while (run := choose_run(opened, site, runs)) is None:
        runs.storage.refresh()
        opened = open_request(request, graph)
    if run.state == "done":
        return Submitted(run.run, "done", address, f"run {run.run} is done; there is nothing to submit")
    if run.submission and submission_state(run.submission).state in ("pending", "running"):
        message = f"run {run.run} is with {run.submission['address']} already, job {run.submission['id']}"
        return Submitted(run.run, run.state, address, message, run.submission)
    submission = {
        "kind": KIND,
        "address": site.jobs.address,
        "id": f"vico-{run.run}-{secrets.token_hex(2)}",
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _enter(runs, run.run, submission)
    with tempfile.TemporaryDirectory(prefix="vico-submit-") as folder:
        text = job_text(request, opened)
        package = Path(folder, "package.zip")
        write_package(package, text.files)
        num_bytes = os.path.getsize(package)
        try:
            env_vars = {**text.env_vars, JOB_VARIABLE: json.dumps(submission)}
            runtime_env = {"working_dir": str(package), "env_vars": env_vars}
            server.submit(text.entrypoint, runtime_env, submission["id"])
        except Exception as error:
            _enter(runs, run.run, None, f"not submitted: {error}")
            raise
    message = (
        f"run {run.run}: handed to {site.jobs.address} as job {submission['id']} "
        f"({num_bytes / 1000:.0f} kB of sources); vico logs -f {run.run} --storage {address} follows it"
    )
    return Submitted(run.run, "pending", address, message, submission)


def _enter(runs: Runs, name: str, submission: dict[str, Any] | None, error: str | None = None) -> None:
    """Write the submission into run.json, which is its driver's unless it has none."""
    with Leases(runs.storage).acquire(runs.run_folder(name), name) as lease:
        run = runs.named(name)
        if run.state == "failed":
            for entry in run.stages.values():
                entry.forced = False  # asked for again after a failure, --force means it again
        run.submission, run.error = submission, error
        run.state = "pending" if error is None else "failed"
        runs.save(run, lease)
