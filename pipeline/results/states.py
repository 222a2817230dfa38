"""The states of runs and stages in words, for people."""

from pipeline.results.runs import ENDED, RunFile, StageEntry


def run_state(run: RunFile) -> str:
    """Return the state in words: a run of `--until STAGE` is `done until STAGE`."""
    from pipeline.config.graph import pipeline_graph, with_joint

    graph, last = pipeline_graph(), list(run.stages)[-1]
    names = (with_joint(graph) if "router" in graph.names else graph).names
    until = f" until {last}" if last in names and last != names[-1] else ""
    return f"{run.state}{until}"


def stage_state(run: RunFile, entry: StageEntry) -> str:
    """Return the state of a stage in words: one that a run has not reached, or will not reach, says so."""
    if entry.reused:
        return "reused"
    if entry.state == "pending":
        return "not reached" if run.state in ENDED else "waits"
    return f"{entry.state}, attempt {entry.attempt}" if entry.attempt > 1 else entry.state
