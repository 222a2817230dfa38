"""The real command line over the tiny stages, as a process that a test can kill.

VICO_DIE=before|unrecorded|recorded:STAGE dies around the stage; TINY_KILL=STAGE:NUMBER inside it (parted.py).
"""

import sys

import pipeline.graph
from pipeline.graph import Graph, StageSpec
from tests.integration.planted_deaths import plant_deaths

NAMES = ("draw", "square", "total")


def tiny_graph() -> Graph:
    return Graph([StageSpec(name, f"tests.integration.tiny_pipeline.{name}") for name in NAMES])


if __name__ == "__main__":
    from pipeline.cli import main

    graph = tiny_graph()
    pipeline.graph.pipeline_graph = lambda: graph
    plant_deaths()
    main()
    sys.exit(0)
