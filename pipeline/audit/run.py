"""`vico audit RUN`: does everything recorded of a run still hold. Reads all of it and changes none of it;
what MLflow lacks is noted, for the next `vico run` to send.
"""

from pathlib import Path

from cluster.site import Site
from pipeline.audit.findings import Findings
from pipeline.audit.lineage import audit_lineage
from pipeline.audit.stage import audit_stage
from pipeline.results.runs import PIPELINE, RUN_FILE, RunFile, Runs, pipeline_digest
from pipeline.results.stage_folder import StageFolder


def audit_run(site: Site, name: str) -> Findings:
    """Everything that is recorded of a run held against everything else; UserError when there is no such
    run."""
    runs = Runs(site.storage)
    run = runs.named(name)
    folders = [StageFolder(site.storage, stage, entry.fingerprint) for stage, entry in run.stages.items()]
    for path in (runs.run_folder(run.run), *(folder.path for folder in folders)):
        runs.storage.refresh(path, anew=True)
    run = runs.named(run.run)
    found = Findings()
    _audit_run_file(run, runs.run_folder(run.run) / RUN_FILE, found)
    records = {}
    for stage in run.stages:
        record = audit_stage(run, stage, site.storage, found)
        if record is not None:
            records[stage] = record
    audit_lineage(run, records, site.storage, found)
    _audit_mlflow(run, site, found)
    return found


def _audit_run_file(run: RunFile, path: Path, found: Findings) -> None:
    fingerprints = {name: entry.fingerprint for name, entry in run.stages.items()}
    if pipeline_digest(fingerprints) != run.pipeline:
        found.problem(
            PIPELINE, "run", path, "was changed: `pipeline` does not fit the fingerprints of its stages"
        )
    unfinished = [name for name, entry in run.stages.items() if entry.state != "done"]
    if unfinished:
        found.note(PIPELINE, f"run {run.run} is {run.state}; not done: {', '.join(unfinished)}")
    elif run.state == "done" and any(attempt.ended is None for attempt in run.attempts[-1:]):
        found.problem(PIPELINE, "run", path, "says done, but its last command has no end")


def _audit_mlflow(run: RunFile, site: Site, found: Findings) -> None:
    if not site.tracking.enabled:
        if run.mlflow_run_id is not None:
            found.note(PIPELINE, f"MLflow was not asked: tracking.enabled is false in site {site.name}")
        return
    from pipeline.audit.mlflow import audit_mlflow

    audit_mlflow(run, site, found)
