"""One stage of a run: reused from the store, or run in an attempt. Start at `StageRunner.complete`.

A stage is reused if the store has its result. Otherwise an attempt runs its code under the stage's lease, and
the record is written last.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster.node_metrics import NodeSampler
from cluster.sources.reports import code_of_attempt, reports_kept_in
from pipeline.identity.provenance import (
    PATCH_FILE,
    git_patch,
    git_state_with_patch,
    package_versions,
    run_environment,
)
from pipeline.identity.source_files import source_digests, sources_digest
from pipeline.json_files import OutputFile, write_bytes
from pipeline.planning.reasons import code_changes, made_by_attempts
from pipeline.planning.shard_contents import check_shards
from pipeline.planning.stage_status import StageStatus, task_status
from pipeline.planning.tasks import StageTask
from pipeline.results.records import CODE, PICTURE_ROOTS, Record, outputs_digest
from pipeline.results.runs import StageEntry
from pipeline.results.stage_folder import StageFolder
from pipeline.running.held_run import HeldRun
from pipeline.running.run_command import RunCommand
from pipeline.running.services import Services
from pipeline.running.stage_context import StageContext, logging_to
from pipeline.running.stage_inputs import StageInputs
from pipeline.storage.lease import Lease
from pipeline.storage.leases import Leases
from pipeline.terminal.progress import duration
from stages.outputs import KERNELS_FILE
from stages.parts import Parts
from stages.stops import Interrupted, LeaseLost

logger = logging.getLogger(__name__)
Counts = Mapping[str, float | int | str]
"""What a stage's `run` returns; recorded as `counts`."""


@dataclass(frozen=True)
class StageAttempt:
    """One attempt at a stage: its task, folder and lease, and when it began."""

    task: StageTask
    folder: StageFolder
    lease: Lease
    parts: Parts
    started: datetime
    started_s: float
    """Value of `time.monotonic` at the start."""

    @property
    def name(self) -> str:
        return self.task.name


class StageRunner:
    """Brings stages of one run to done. Threads may share it."""

    def __init__(self, command: RunCommand, held: HeldRun, services: Services):
        self.request, self.forced, self.cache = command.request, command.opened.forced, command.opened.cache
        self.site, self.signals, self.display = command.site, command.signals, command.display
        self.held, self.services = held, services
        self._pipeline, self._has_checked_shards = command.opened.pipeline, False
        self.inputs = StageInputs(self._pipeline, command.site, held.run, command.opened.cache)

    def complete(self, task: StageTask) -> None:
        """Bring one stage to done. Raises what its code raises; the caller then enters it in run.json."""
        folder = task.folder(self.site.storage)
        folder.storage.refresh(folder.path)  # also its metrics, which MLflow may still lack
        if not self._must_force(task) and self._reused(task, folder):
            return
        with self._acquired_lease(task, folder) as lease:
            folder.storage.refresh(folder.path)
            if self._must_force(task):
                self._archive(task, folder, lease, "--force")
                self._entry(task).forced = True
            elif self._reused(task, folder):  # the previous holder of the lease may have finished it
                return
            self._run(task, folder, lease)

    def _must_force(self, task: StageTask) -> bool:
        return task.name in self.forced and not self._entry(task).forced

    def _reused(self, task: StageTask, folder: StageFolder) -> bool:
        """Return whether the stage is done already; if it is, enter it as reused."""
        status = self._status(task)
        record = status.record
        if status.kind != "reuse" or record is None:
            return False
        self._entry(task).mark_reused(record)
        self._enter_done(task, folder, record)
        self.display.line(f"{task.name}: reused, {status.reason}")
        for change in code_changes(task, record):
            self.display.line(f"{task.name}: {change}")
        return True

    def _acquired_lease(self, task: StageTask, folder: StageFolder) -> Lease:
        return Leases(folder.storage).acquire(
            folder.path,
            self.held.name,
            min_attempt=folder.last_attempt() + 1,
            wait_s=self.request.wait_s,
            on_wait=lambda holder: self.display.line(
                f"{task.name}: waiting for run {holder.run} on {holder.host}, pid {holder.pid}"
            ),
        )

    def _run(self, task: StageTask, folder: StageFolder, lease: Lease) -> None:
        self.inputs.fetch(task)
        self._check_shards(task)
        self.services.start(task)
        status = self._status(task)
        if status.kind == "restart":
            self._archive(task, folder, lease, status.reason)
        missing = self._attempt(task, folder, lease, status)
        if missing:
            # The stage saw its parts as complete and did not check what was lost inside them.
            self._archive(task, folder, lease, f"resuming did not rebuild {missing[0]}")
            lease.next_attempt()
            self._attempt(task, folder, lease, StageStatus("new"))

    def _check_shards(self, task: StageTask) -> None:
        """Before the first stage that reads the shards: check that they hold what all stages need of them."""
        shards = self.inputs.output("shard") if "shard" in task.inputs else None
        if shards is not None and not self._has_checked_shards:
            check_shards(self._pipeline.config, [task.name for task in self._pipeline.tasks], shards)
            self._has_checked_shards = True

    def _attempt(self, task: StageTask, folder: StageFolder, lease: Lease, status: StageStatus) -> list[str]:
        """Run the stage's code and record the result. Return the expected outputs that it did not make; then
        nothing is recorded."""
        attempt = self._begin(task, folder, lease, status)
        logs = attempt.parts.attempt_folder
        with folder.storage.sharing(folder.path, logs), logging_to(logs / "driver.log", of_stage=True):
            reason = f" ({status.reason})" if status.reason else ""
            self.display.stage_started(task.name, f"{task.name}: starts, attempt {lease.attempt}{reason}")
            _keep_patch(attempt.parts)
            with _logged_failures(attempt):
                counts = self._call(attempt)
            folder.storage.flush(folder.path)
            outputs = folder.outputs(self.cache.sha256s)
            missing = [name for name in status.expected if name not in outputs]
            if not missing:
                self._finish(attempt, outputs, counts)
            return missing

    def _begin(self, task: StageTask, folder: StageFolder, lease: Lease, status: StageStatus) -> StageAttempt:
        """Make the attempt's folder and enter the attempt into run.json."""
        started = datetime.now(UTC)
        sources = source_digests(task.spec.module_name)
        parts = folder.begin(
            lease, self.inputs.digests(task), status.expected, _iso(started), sources, package_versions()
        )
        if status.kind == "rebuild":
            folder.supersede_record(lease, status.damage)
        entry = self._entry(task)
        entry.state, entry.attempt, entry.seconds = "running", lease.attempt, None
        entry.reused, entry.reused_from = False, None
        entry.mlflow_run_id = self.services.stage_run_id(task.name)
        self.held.save()
        return StageAttempt(task, folder, lease, parts, started, time.monotonic())

    def _call(self, attempt: StageAttempt) -> Counts:
        """Call the stage's `run` and return its counts."""
        context = StageContext(
            stage=attempt.name,
            parts=attempt.parts,
            inputs=self.inputs.files(attempt.task),
            site=self.site.for_stage(attempt.name),
            leases=(self.held.lease, attempt.lease),
            signals=self.signals,
            display=self.display,
        )
        try:
            folder = attempt.parts.attempt_folder
            with NodeSampler(folder), reports_kept_in(folder):
                counts = attempt.task.spec.run(attempt.task.config, context)
        except Exception:
            context.check()  # a stop or a lost lease may look like a failure inside the stage
            raise
        context.check()
        return counts

    def _finish(self, attempt: StageAttempt, outputs: dict[str, OutputFile], counts: Counts) -> None:
        """Write the record, then enter the stage as done."""
        self.inputs.check_unchanged(attempt.task)
        record = self._record(attempt, outputs, counts)
        attempt.folder.finish(attempt.lease, record)
        entry = self._entry(attempt.task)
        entry.state, entry.seconds, entry.mlflow_run_id = "done", record.seconds, record.mlflow_run_id
        self._enter_done(attempt.task, attempt.folder, record)
        text = f"{attempt.name}: done in {duration(record.seconds)}{_first_counts(counts)}"
        self.display.stage_ended(attempt.name, text)

    def _record(self, attempt: StageAttempt, outputs: dict[str, OutputFile], counts: Counts) -> Record:
        task, seconds = attempt.task, time.monotonic() - attempt.started_s
        sources = source_digests(task.spec.module_name)
        return Record(
            stage=task.name,
            fingerprint=task.fingerprint,
            identity=task.identity,
            attempt=attempt.lease.attempt,
            run=self.held.name,
            git=git_state_with_patch(),
            source_digest=sources_digest(sources),
            sources=sources,
            packages=package_versions(),
            outputs=outputs,
            output_digest=outputs_digest(outputs),
            inputs=self.inputs.digests(task),
            counts=dict(counts),
            seconds=seconds,
            started=_iso(attempt.started),
            ended=_iso(datetime.now(UTC)),
            site=self.site.name,
            facts=run_environment(self.site.for_stage(task.name))
            | {CODE: code_of_attempt(attempt.parts.attempt_folder)}
            | _kernels(attempt.parts.attempt_folder)
            | ({PICTURE_ROOTS: list(task.picture_roots)} if task.picture_roots else {})
            | made_by_attempts(attempt.folder, sources, package_versions()),
            mlflow_run_id=self.services.stage_run_id(task.name),
        )

    def _entry(self, task: StageTask) -> StageEntry:
        return self.held.run.stages[task.name]

    def _status(self, task: StageTask) -> StageStatus:
        inputs = self.inputs.digests(task)
        return task_status(task, self.site.storage, inputs, strict_code=self.request.strict_code)

    def _enter_done(self, task: StageTask, folder: StageFolder, record: Record) -> None:
        """Make the output available to later stages and write run.json."""
        self.inputs.add_output(task, folder, record.output_digest)
        self.held.save()

    def _archive(self, task: StageTask, folder: StageFolder, lease: Lease, reason: str) -> None:
        """Move an earlier result, if there is one, to `superseded/<n>`."""
        archived = folder.supersede(lease)
        if archived is not None:
            address = folder.storage.address(archived)
            self.display.line(f"{task.name}: earlier result moved to {address} ({reason})")


def _kernels(attempt_folder: Path) -> dict[str, str]:
    """Return the fact that a training left of what computed on its rank 0; empty for other stages."""
    path = attempt_folder / KERNELS_FILE
    return {"kernels": path.read_text(encoding="utf-8").strip()} if path.is_file() else {}


@contextmanager
def _logged_failures(attempt: StageAttempt) -> Iterator[None]:
    """Write why an attempt ended early into its log."""
    name, number = attempt.name, attempt.lease.attempt
    try:
        yield
    except LeaseLost as lost:
        logger.error("%s: attempt %d ends: %s", name, number, lost)
        raise
    except Interrupted as stop:
        logger.info("%s: attempt %d stopped by %s", name, number, stop)
        raise
    except Exception:
        logger.exception("%s: attempt %d failed", name, number)
        raise


def _keep_patch(parts: Parts) -> None:
    """Keep how the checkout differs from its commit, if it does."""
    patch = git_patch()
    if patch is not None:
        write_bytes(parts.attempt_folder / PATCH_FILE, patch.encode())


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _first_counts(counts: Counts) -> str:
    """Return up to six counts for the line that ends a stage."""
    texts = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in list(counts.items())[:6]
    ]
    return ": " + ", ".join(texts) if texts else ""
