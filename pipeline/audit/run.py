"""`vico audit RUN`: check that everything recorded of a run still holds.

The audit reads all of it and changes nothing. If MLflow lacks something, it makes a note for the next `vico
run`.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.audit.findings import Findings
from pipeline.audit.lineage import audit_lineage
from pipeline.audit.seal import check_place, check_unwritten, compare_with_seal, read_seal, write_seal
from pipeline.audit.stage import audit_stage
from pipeline.results.runs import PIPELINE, RUN_FILE, RunFile, Runs, pipeline_digest
from pipeline.results.stage_folder import StageFolder
from vico.errors import UserError


def audit_run(site: Site, name: str) -> Findings:
    """Compare everything that is recorded of a run; raise UserError if there is no such run."""
    runs = Runs(site.storage)
    run = runs.named(name)
    folders = [StageFolder(site.storage, stage, entry.fingerprint) for stage, entry in run.stages.items()]
    for path in (runs.run_folder(run.run), *(folder.path for folder in folders)):
        runs.storage.refresh(path, full=True)
    run = runs.named(run.run)
    findings = Findings()
    findings.facts.run = _identity(run)
    _audit_run_file(run, runs.run_folder(run.run) / RUN_FILE, findings)
    records = {}
    for stage in run.stages:
        record = audit_stage(run, stage, site.storage, findings)
        if record is not None:
            records[stage] = record
    audit_lineage(run, records, site.storage, findings)
    _audit_mlflow(run, site, findings)
    return findings


def audit_with_seal(site: Site, name: str, seal: Path | None, against: Path | None) -> Findings:
    """Audit a run; write its seal to `seal` if it has no problems, or compare it with the seal `against`.

    Raises UserError for a seal in the storage, one that exists or is not of this run, and to seal a run that
    is not done.
    """
    run = Runs(site.storage).named(name)
    if seal is not None:
        check_place(seal, site, "--seal")
        check_unwritten(seal)
        unfinished = [stage for stage, entry in run.stages.items() if entry.state != "done"]
        if unfinished:
            raise UserError(f"--seal: {', '.join(unfinished)} of run {run.run} is not done; finish the run")
    if against is not None:
        check_place(against, site, "--against")
        sealed = read_seal(against, run)
        findings = audit_run(site, name)
        compare_with_seal(sealed, findings.facts, findings)
        findings.note(PIPELINE, f"compared with the seal of {sealed.sealed}, digest {sealed.digest}")
        return findings
    findings = audit_run(site, name)
    if seal is not None and findings.problems:
        findings.note(PIPELINE, f"no seal was written to {seal}: the run has problems")
    elif seal is not None:
        written = write_seal(seal, run, findings.facts, datetime.now(UTC).isoformat(timespec="seconds"))
        findings.note(PIPELINE, f"sealed in {seal}, digest {written.digest}; keep both out of this storage")
    return findings


def _identity(run: RunFile) -> dict[str, Any]:
    """Return what a later command on the finished run leaves as it is."""
    content = run.content()
    stages = {
        name: {key: entry[key] for key in ("fingerprint", "state", "attempt", "mlflow_run_id")}
        for name, entry in content["stages"].items()
    }
    names = ("run", "created", "pipeline", "experiment", "config", "state", "mlflow_run_id")
    return {**{name: content[name] for name in names}, "stages": stages}


def _audit_run_file(run: RunFile, path: Path, findings: Findings) -> None:
    fingerprints = {name: entry.fingerprint for name, entry in run.stages.items()}
    if pipeline_digest(fingerprints) != run.pipeline:
        message = "was edited: `pipeline` does not match the fingerprints of its stages"
        findings.problem(PIPELINE, "run", path, message)
    unfinished = [name for name, entry in run.stages.items() if entry.state != "done"]
    if unfinished:
        findings.note(PIPELINE, f"run {run.run} is {run.state}; not done: {', '.join(unfinished)}")
    elif run.state == "done" and any(attempt.ended is None for attempt in run.attempts[-1:]):
        findings.problem(PIPELINE, "run", path, "says done, but its last command has no end")


def _audit_mlflow(run: RunFile, site: Site, findings: Findings) -> None:
    if not site.tracking.enabled:
        if run.mlflow_run_id is not None:
            findings.note(PIPELINE, f"MLflow was not checked: tracking.enabled is false in site {site.name}")
        return
    from pipeline.audit.mlflow import audit_mlflow

    audit_mlflow(run, site, findings)
