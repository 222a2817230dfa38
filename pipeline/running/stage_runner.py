"""One stage of a run: found done, or begun, run and recorded under its lease. Called by the runner."""

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from cluster.node_metrics import NodeSampler
from cluster.site import Site
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.provenance import PATCH_FILE, git_facts, git_patch, package_versions, site_facts
from pipeline.identity.source_files import source_digests, sources_digest
from pipeline.json_files import OutputFile
from pipeline.planning.reasons import code_changes, codes_of_attempts
from pipeline.planning.standing import Standing, task_standing
from pipeline.planning.tasks import Pipeline, StageTask
from pipeline.progress import Display, duration
from pipeline.results.runs import RunFile, Runs, StageEntry
from pipeline.results.stage_folder import Record, StageFolder, outputs_digest
from pipeline.running.signals import StopSignals
from pipeline.running.stage_context import StageContext, logging_to
from pipeline.running.stage_inputs import StageInputs
from pipeline.storage.lease import Lease, Leases
from stages.parts import Parts
from stages.stops import Interrupted, LeaseLost

logger = logging.getLogger(__name__)


class StageRuns:
    """Takes stages of a pipeline to done, for one run whose lease this process holds; threads may share
    it."""

    def __init__(
        self,
        pipeline: Pipeline,
        site: Site,
        runs: Runs,
        run: RunFile,
        lease: Lease,
        cache: DigestCache,
        *,
        forced: frozenset[str],
        strict_code: bool,
        wait_s: float,
        signals: StopSignals,
        display: Display,
        start_services: Callable[[StageTask], None],
        mlflow_run_id: Callable[[str], str | None],
    ):
        self.site, self.runs, self.run, self.lease = site, runs, run, lease
        self.inputs, self.cache = StageInputs(pipeline, site, run, cache), cache
        self.forced, self.strict_code, self.wait_s = forced, strict_code, wait_s
        self.signals, self.display = signals, display
        self._start_services, self._mlflow_run_id = start_services, mlflow_run_id

    def take(self, task: StageTask) -> None:
        """Bring one stage to done. Raises what its code raises; the states in run.json are the caller's to
        close."""
        folder = task.folder(self.site.storage)
        folder.storage.refresh(folder.path)  # its metrics, too, which tracking may still lack
        if not self._must_force(task) and self._reused(task, folder):
            return
        lease = Leases(folder.storage).acquire(
            folder.path,
            self.run.run,
            min_attempt=folder.last_attempt() + 1,
            wait_s=self.wait_s,
            on_wait=lambda holder: self.display.line(
                f"{task.name}: waiting for run {holder.run} on {holder.host}, pid {holder.pid}"
            ),
        )
        with lease:
            folder.storage.refresh(folder.path)
            if self._must_force(task):
                self._set_aside(task, folder, lease, "--force")
                self._entry(task).forced = True
            elif self._reused(task, folder):  # whoever held the lease may have finished it
                return
            self._run(task, folder, lease)

    def _entry(self, task: StageTask) -> StageEntry:
        return self.run.stages[task.name]

    def _must_force(self, task: StageTask) -> bool:
        return task.name in self.forced and not self._entry(task).forced

    def _standing(self, task: StageTask) -> Standing:
        return task_standing(task, self.site.storage, self.inputs.digests(task), strict_code=self.strict_code)

    def _reused(self, task: StageTask, folder: StageFolder) -> bool:
        """Whether the stage is done already; then it is entered as such."""
        found = self._standing(task)
        record = found.record
        if found.way != "reuse" or record is None:
            return False
        self._entry(task).enter_reused(record)
        self._done(task, folder, record.output_digest)
        self.display.line(f"{task.name}: reused, {found.reason}")
        for change in code_changes(task, record):
            self.display.line(f"{task.name}: {change}")
        return True

    def _done(self, task: StageTask, folder: StageFolder, output_digest: str) -> None:
        self.inputs.made(task, folder, output_digest)
        self.runs.save(self.run, self.lease)

    def _set_aside(self, task: StageTask, folder: StageFolder, lease: Lease, reason: str) -> None:
        aside = folder.set_aside(lease)
        if aside is not None:
            place = folder.storage.place(aside)
            self.display.line(f"{task.name}: earlier result moved to {place} ({reason})")

    def _run(self, task: StageTask, folder: StageFolder, lease: Lease) -> None:
        self.inputs.fetch(task)
        self._start_services(task)
        found = self._standing(task)
        if found.way == "afresh":
            self._set_aside(task, folder, lease, found.reason)
        missing = self._attempt(task, folder, lease, found)
        if missing:
            # The stage took its parts for whole and did not look at what was lost in them.
            self._set_aside(task, folder, lease, f"{missing[0]} is not made again by going on")
            lease.next_attempt()
            missing = self._attempt(task, folder, lease, Standing("new"))

    def _attempt(self, task: StageTask, folder: StageFolder, lease: Lease, found: Standing) -> list[str]:
        """Run the stage's code and record the result; or return the expected outputs that it did not make."""
        entry, inputs, started = self._entry(task), self.inputs.digests(task), datetime.now(UTC)
        sources = source_digests(task.spec.module_name)
        parts = folder.begin(lease, inputs, found.expected, _iso(started), sources)
        if found.way == "rebuild":
            folder.set_record_aside(lease, found.damage)
        entry.state, entry.attempt, entry.seconds = "running", lease.attempt, None
        entry.reused, entry.reused_from, entry.mlflow_run_id = False, None, self._mlflow_run_id(task.name)
        self.runs.save(self.run, self.lease)
        since = time.monotonic()
        logs = parts.attempt_folder
        with (
            folder.storage.attending(folder.path, logs),
            logging_to(logs / "driver.log", of_stage=True),
        ):
            why = f" ({found.reason})" if found.reason else ""
            self.display.stage_started(task.name, f"{task.name}: starts, attempt {lease.attempt}{why}")
            _keep_patch(parts)
            try:
                counts = self._call(task, parts, lease)
            except LeaseLost as lost:
                logger.error("%s: attempt %d ends: %s", task.name, lease.attempt, lost)
                raise
            except Interrupted as stop:
                logger.warning("%s: attempt %d stopped by %s", task.name, lease.attempt, stop)
                raise
            except Exception:
                logger.exception("%s: attempt %d failed", task.name, lease.attempt)
                raise
            folder.storage.settle(folder.path)
            outputs = folder.outputs(self.cache.sha256s)
            missing = [name for name in found.expected if name not in outputs]
            if missing:
                return missing
            seconds = time.monotonic() - since
            record = self._record(task, folder, lease.attempt, outputs, counts, started, seconds)
            folder.finish(lease, record)
            entry.state, entry.seconds, entry.mlflow_run_id = "done", seconds, record.mlflow_run_id
            self._done(task, folder, record.output_digest)
            self.display.stage_ended(task.name, f"{task.name}: done in {duration(seconds)}{_shown(counts)}")
        return []

    def _call(self, task: StageTask, parts: Parts, lease: Lease) -> Mapping[str, Any]:
        context = StageContext(
            stage=task.name,
            parts=parts,
            inputs=self.inputs.given(task),
            site=self.site,
            leases=(self.lease, lease),
            signals=self.signals,
            display=self.display,
        )
        try:
            with NodeSampler(parts.attempt_folder):
                counts = task.spec.run(task.config, context)
        except Exception:
            context.check()  # the failure may be what a stop or a lost lease looks like from inside
            raise
        context.check()
        return counts

    def _record(
        self,
        task: StageTask,
        folder: StageFolder,
        attempt: int,
        outputs: dict[str, OutputFile],
        counts: Mapping[str, Any],
        started: datetime,
        seconds: float,
    ) -> Record:
        sources = source_digests(task.spec.module_name)
        return Record(
            stage=task.name,
            fingerprint=task.fingerprint,
            identity=task.identity,
            attempt=attempt,
            run=self.run.run,
            git=git_facts(),
            source_digest=sources_digest(sources),
            sources=sources,
            packages=package_versions(),
            outputs=outputs,
            output_digest=outputs_digest(outputs),
            inputs=self.inputs.digests(task),
            counts=dict(counts),
            seconds=seconds,
            started=_iso(started),
            ended=_iso(datetime.now(UTC)),
            site=self.site.name,
            facts=site_facts(self.site) | codes_of_attempts(folder, sources),
            mlflow_run_id=self._mlflow_run_id(task.name),
        )


def _keep_patch(parts: Parts) -> None:
    patch = git_patch()
    if patch is not None:
        (parts.attempt_folder / PATCH_FILE).write_text(patch, encoding="utf-8")


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _shown(counts: Mapping[str, Any]) -> str:
    """Up to six counts for the line that ends a stage."""
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in list(counts.items())[:6]
    ]
    return ": " + ", ".join(shown) if shown else ""
