"""`vico audit RUN`: check that everything recorded of a run still holds.

The audit reads all of it and changes nothing. If MLflow lacks something, it makes a note for the next `vico
run`.
"""

from pathlib import Path

from cluster.site import Site
from pipeline.audit.findings import Findings
from pipeline.audit.lineage import audit_lineage
from pipeline.audit.stage import audit_stage
from pipeline.results.runs import PIPELINE, RUN_FILE, RunFile, Runs, pipeline_digest
from pipeline.results.stage_folder import StageFolder


def audit_run(site: Site, name: str) -> Findings:
    """Compare everything that is recorded of a run; raise UserError if there is no such run."""
    runs = Runs(site.storage)
    run = runs.named(name)
    folders = [StageFolder(site.storage, stage, entry.fingerprint) for stage, entry in run.stages.items()]
    for path in (runs.run_folder(run.run), *(folder.path for folder in folders)):
        runs.storage.refresh(path, full=True)
    run = runs.named(run.run)
    findings = Findings()
    _audit_run_file(run, runs.run_folder(run.run) / RUN_FILE, findings)
    records = {}
    for stage in run.stages:
        record = audit_stage(run, stage, site.storage, findings)
        if record is not None:
            records[stage] = record
    audit_lineage(run, records, site.storage, findings)
    _audit_mlflow(run, site, findings)
    return findings


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
