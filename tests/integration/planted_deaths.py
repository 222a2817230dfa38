"""Places at which a real driver kills itself with SIGKILL, by VICO_DIE=PLACE:STAGE in its environment.

before: the stage was not begun. middle: parts of it, or steps of its training, are there. unrecorded: its
output is whole, its record is not. recorded: its record is there and run.json does not know. stored: the
object store names a checkpoint of its training.

    python -m tests.integration.planted_deaths COMMAND ...    is `vico COMMAND ...` with these places
"""

import os
import signal
import time

from pipeline.attempt import StageContext
from pipeline.stage_run import StageRuns
from pipeline.store import StageFolder
from stages.parts import Parts

PLACES = ("before", "middle", "unrecorded", "recorded")
FIRST_CHECKPOINT = 3
"""Steps after which the test pipeline has a checkpoint; a training dies past it."""


def die_if(place: str) -> None:
    if os.environ.get("VICO_DIE") == place:
        os.kill(os.getpid(), signal.SIGKILL)


def plant_deaths() -> None:
    take, finish = StageRuns.take, StageFolder.finish

    def dying_take(self, task):
        die_if(f"before:{task.name}")
        take(self, task)

    def dying_finish(self, lease, record):
        die_if(f"unrecorded:{self.stage}")
        finish(self, lease, record)
        die_if(f"recorded:{self.stage}")

    StageRuns.take, StageFolder.finish = dying_take, dying_finish


def plant_deaths_in_the_middle() -> None:
    """A stage with workers dies when it says how far they are, one without when it publishes a part."""
    progress, publish = StageContext.progress, Parts.publish

    def dying_progress(self, done, total, unit):
        if done > FIRST_CHECKPOINT if unit == "steps" else done > 0:
            die_if(f"middle:{self.stage}")
        if done and os.environ.get("VICO_DIE") == f"stored:{self.stage}":
            while '"checkpoints/' not in (self.parts.folder / "parts.json").read_text():
                time.sleep(0.05)
            die_if(f"stored:{self.stage}")
        progress(self, done, total, unit)

    def dying_publish(self, name, **options):
        die_if(f"middle:{self.folder.parent.name}")
        return publish(self, name, **options)

    StageContext.progress, Parts.publish = dying_progress, dying_publish


if __name__ == "__main__":
    from pipeline.cli import main

    plant_deaths()
    plant_deaths_in_the_middle()
    main()
