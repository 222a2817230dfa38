"""The real command line over the tiny stages, as a process that a test can kill.

TINY_KILL=before|unrecorded|recorded:STAGE dies around the stage; STAGE:NUMBER dies inside it (see parted.py).
"""

import os
import signal
import sys

import pipeline.graph
from pipeline.graph import Graph, StageSpec
from pipeline.stage_run import StageRuns
from pipeline.store import StageFolder

NAMES = ("draw", "square", "total")


def tiny_graph() -> Graph:
    return Graph([StageSpec(name, f"tests.integration.tiny_pipeline.{name}") for name in NAMES])


def die_if(place: str) -> None:
    if os.environ.get("TINY_KILL") == place:
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


if __name__ == "__main__":
    from pipeline.cli import main

    graph = tiny_graph()
    pipeline.graph.pipeline_graph = lambda: graph
    plant_deaths()
    main()
    sys.exit(0)
