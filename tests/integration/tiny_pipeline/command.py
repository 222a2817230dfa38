"""The real command line over the tiny stages, as a process that a test can kill.

VICO_DIE=before|unrecorded|recorded:STAGE kills it around the stage, TINY_KILL=STAGE:NUMBER inside
(parted.py).
"""

import os
import sys

import pipeline.config.graph
from pipeline.config.graph import Graph, StageSpec
from tests.integration.planted_deaths import plant_deaths

NAMES = ("draw", "square", "total")
FORKED = ("draw", "square", "cube", "both")


def tiny_graph() -> Graph:
    """Return the chain of stages, or with TINY_FORK a graph with two branches."""
    names = FORKED if "TINY_FORK" in os.environ else NAMES
    return Graph([StageSpec(name, f"tests.integration.tiny_pipeline.{name}") for name in names])


if __name__ == "__main__":
    from pipeline.cli import main

    graph = tiny_graph()
    pipeline.config.graph.pipeline_graph = lambda: graph
    plant_deaths()
    main()
    sys.exit(0)
