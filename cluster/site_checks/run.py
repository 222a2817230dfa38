"""Run all checks of a site from inside its cluster: in a job, on one of its nodes, or on this machine."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack

import ray

from cluster.ray_session import join, start_local
from cluster.ray_start.local import temporary_ray_folder
from cluster.site import Site
from cluster.site_checks.collective import check_all_reduce
from cluster.site_checks.nodes import check_nodes
from cluster.site_checks.report import CheckResult, failed, passed, skipped
from vico.errors import UserError, one_line

_MLFLOW_TIMEOUT_S = 20


def check_site(site: Site, submitter: Mapping[str, str] | None = None) -> list[CheckResult]:
    """Return the results of all checks. Never raises for what is wrong with the site.

    In a job, `submitter` has the versions of the machine that submitted it, see `versions_here`.
    """
    address = os.environ.get("RAY_ADDRESS") or site.ray.address
    with ExitStack() as stack:
        try:
            stack.callback(ray.shutdown)
            if address:
                join(address, site)
            else:
                start_local(stack.enter_context(temporary_ray_folder(site.ray.temp_dir)), site)
        except UserError as error:
            return [failed("cluster", str(error), "see the message"), check_mlflow(site)]
        where = f"Ray at {address}" if address else "a local Ray"
        checks = [passed("cluster", f"{where} answers"), *check_nodes(site, submitter), check_mlflow(site)]
        return [*checks, check_all_reduce(site)]


def check_mlflow(site: Site) -> CheckResult:
    """Return whether MLflow answers."""
    uri = site.tracking_address
    if not site.tracking.enabled:
        return skipped("mlflow", "tracking.enabled is false")
    if not uri.startswith(("http://", "https://")):
        return passed("mlflow", f"a database: {uri}")
    remedy = "correct tracking.uri, or let the nodes reach it; runs go on without MLflow and sync later"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_MLFLOW_TIMEOUT_S) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except OSError as error:
        return failed("mlflow", f"tracking.uri={uri} does not answer: {one_line(error)}", remedy)
    if status in (401, 403):
        return passed("mlflow", f"{uri} answers and wants a login (MLFLOW_TRACKING_USERNAME and _PASSWORD)")
    if status != 200:
        return failed("mlflow", f"tracking.uri={uri} answers {status} to /health", remedy)
    return passed("mlflow", f"{uri} answers")
