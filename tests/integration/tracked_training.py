"""A process that looks like a training to tracking, for a test to kill.

It resumes from its last checkpoint and writes the metrics of a step every few milliseconds, while a real
tracking thread sends them.

    python -m tests.integration.tracked_training STORAGE NUM_STEPS [TRACKING_URI]
"""

import sys
import time
from pathlib import Path

from cluster.metric_lines import STEP_METRICS_FILE, MetricsWriter
from cluster.site import Site
from pipeline.results.runs import RunAttempt, RunFile, Runs
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.leases import Leases
from pipeline.tracking.thread import TrackingThread

FINGERPRINT = "f" * 64
CHECKPOINT_EVERY = 25
STOP_FILE = "stop"
"""If this file is in the storage, the training ends with the current step as if it were the last."""
STEP_S, SERVER_STEP_S = 0.01, 0.05
"""Seconds per step with a database and with a server, which needs seconds for a thousand values on a busy
machine."""
EXPERIMENT = "killed"


def existing_or_new_run(runs: Runs) -> RunFile:
    existing = runs.all()
    if existing:
        return existing[0]
    return runs.create(
        pipeline="p" * 64,
        fingerprints={"train": FINGERPRINT},
        experiment=EXPERIMENT,
        config={"seed": 1, "train": {"lr": 1e-3}},
        site="test",
    )


def main(storage: Path, num_steps: int, uri: str | None = None) -> None:
    site = Site.model_validate(
        {"storage": str(storage), "tracking": {"interval_s": 0.05, "finish_timeout_s": 300, "uri": uri}}
    )
    runs = Runs(storage)
    run = existing_or_new_run(runs)
    with Leases(runs.storage).acquire(runs.run_folder(run.run), run.run) as run_lease:
        folder = StageFolder(storage, "train", FINGERPRINT)
        with Leases(folder.storage).acquire(
            folder.path, run.run, min_attempt=folder.last_attempt() + 1
        ) as lease:
            parts = folder.begin(lease, {"records": "d" * 64}, [], "2026-01-01T00:00:00.000+00:00")
            run.state = run.stages["train"].state = "running"
            run.stages["train"].attempt = lease.attempt
            run.attempts.append(RunAttempt(started="2026-01-01T00:00:00.000+00:00", host="here", pid=1))
            runs.save(run, run_lease)
            tracking = TrackingThread(site, runs.run_folder(run.run))
            tracking.start()
            checkpoint = folder.output / "checkpoint"
            step = int(checkpoint.read_text()) if checkpoint.exists() else 0
            with MetricsWriter(parts.attempt_folder / STEP_METRICS_FILE) as metrics:
                while step < num_steps and not (storage / STOP_FILE).exists():
                    step += 1
                    metrics.append(step, {"loss": 1 / step, "attempt": float(lease.attempt)})
                    time.sleep(STEP_S if uri is None else SERVER_STEP_S)
                    if step % CHECKPOINT_EVERY == 0:
                        partial = checkpoint.with_suffix(".partial")  # this process is killed at any moment
                        partial.write_text(str(step))
                        partial.replace(checkpoint)
            run.state = run.stages["train"].state = run.attempts[-1].state = "done"
            run.attempts[-1].ended = "2026-01-01T01:00:00.000+00:00"
            runs.save(run, run_lease)
            print(tracking.finish())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
