"""Moments at which a real driver kills itself with SIGKILL, set by VICO_DIE=MOMENT:STAGE in its environment.

before: the stage has not begun. middle: some of its parts, or steps of its training, exist. unrecorded: its
output is complete, its record is missing. recorded: its record exists, but run.json does not know it. stored:
the object store has a checkpoint of its training, which is stopped there; its workers die with the driver.

python -m tests.integration.planted_deaths COMMAND ...    is `vico COMMAND ...` with these moments
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

from pipeline.results.stage_folder import StageFolder
from pipeline.running.stage_context import StageContext
from pipeline.running.stage_runner import StageRunner
from pipeline.storage.working_copy import PARTS_FILE
from stages.durable_files import locked
from stages.parts import JOURNAL_FILE, Parts
from stages.training.metrics import read_metrics

MOMENTS = ("before", "middle", "unrecorded", "recorded")
TRAININGS = ("consistency", "router", "joint_consistency", "joint_router")
FIRST_CHECKPOINT = 3
"""Steps after which the test pipeline has a checkpoint; a training dies after it."""


def die_if(moment: str) -> None:
    if os.environ.get("VICO_DIE") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def plant_deaths() -> None:
    take, finish = StageRunner.complete, StageFolder.finish

    def dying_take(self, task):
        die_if(f"before:{task.name}")
        take(self, task)

    def dying_finish(self, lease, record):
        die_if(f"unrecorded:{self.stage}")
        finish(self, lease, record)
        die_if(f"recorded:{self.stage}")

    StageRunner.complete, StageFolder.finish = dying_take, dying_finish


def plant_deaths_in_the_middle() -> None:
    """A training dies after its first checkpoint, another stage with workers when it reports progress, a
    stage without workers when it publishes a part."""
    progress, publish, begin = StageContext.progress, Parts.publish, StageFolder.begin

    def dying_progress(self, done, total, unit, figures=None):
        if done > 0 and unit != "steps":
            die_if(f"middle:{self.stage}")
        progress(self, done, total, unit, figures)

    def dying_publish(self, name, **options):
        die_if(f"middle:{self.folder.parent.name}")
        return publish(self, name, **options)

    def watched_begin(self, *arguments):
        parts = begin(self, *arguments)
        deaths = {f"stored:{self.stage}": die_when_stored}
        if self.stage in TRAININGS:
            deaths[f"middle:{self.stage}"] = die_in_training
        death = deaths.get(os.environ.get("VICO_DIE", ""))
        if death is not None:
            threading.Thread(target=death, args=(parts,), daemon=True).start()
        return parts

    StageContext.progress, Parts.publish, StageFolder.begin = dying_progress, dying_publish, watched_begin


def die_in_training(parts: Parts) -> None:
    """Poll more often than the driver does: the test pipeline makes a step in a fifth of a second."""
    while max((step for step, _ in read_metrics(parts)), default=0) <= FIRST_CHECKPOINT:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_stored(parts: Parts) -> None:
    """Suspend the workers until the first checkpoint is in the store: a short training would end before."""
    while not _names_a_checkpoint(parts.attempt_folder / JOURNAL_FILE):
        time.sleep(0.01)
    children = psutil.Process().children(recursive=True)
    workers = [child for child in children if child.name().startswith("ray::")]
    with locked(parts.folder):  # so that none of them holds the lock
        for worker in workers:
            worker.suspend()
    while not _names_a_checkpoint(parts.folder / PARTS_FILE):
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _names_a_checkpoint(path: Path) -> bool:
    return path.exists() and "checkpoints/" in path.read_text()


if __name__ == "__main__":
    from pipeline.cli import main

    plant_deaths()
    plant_deaths_in_the_middle()
    main()
