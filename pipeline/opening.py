"""A request read, checked and planned, and the run it belongs to. Used by run, plan and submit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.config import PipelineConfig, check_together, load_config
from pipeline.digests import DigestCache
from pipeline.graph import Graph
from pipeline.planning import Pipeline, PlannedStage, plan, resolve
from pipeline.runs import RunFile, Runs


@dataclass(frozen=True)
class RunRequest:
    """What the command line asks for."""

    config: Path
    site: Site
    overrides: tuple[str, ...] = ()
    force: tuple[str, ...] = ()
    until: str | None = None
    wait_s: float = 0.0
    strict_code: bool = False


@dataclass(frozen=True)
class OpenPipeline:
    """A request that was read and checked: identities, plan, and the stages to run in any case."""

    pipeline: Pipeline
    planned: list[PlannedStage]
    forced: frozenset[str]
    cache: DigestCache
    newest_done: str | None
    """The newest run of this pipeline, where it was done before the stages were planned."""

    @property
    def is_done(self) -> bool:
        return all(one.action == "reuse" for one in self.planned)


def open_pipeline(request: RunRequest, graph: Graph) -> OpenPipeline:
    """Read and check the config and plan its stages; writes nothing. Raises UserError."""
    config = load_config(request.config, graph, request.overrides)
    check_together(config, request.site)
    asked = graph.until(request.until)
    for name in request.force:
        asked.check_name(name, "--force")
    cache = DigestCache(request.site.storage)
    pipeline = resolve(asked, config, cache)
    newest_done = _newest_done(Runs(request.site.storage), pipeline)
    forced = frozenset(asked.dependents(request.force))
    planned = plan(pipeline, request.site.storage, forced, strict_code=request.strict_code)
    return OpenPipeline(pipeline, planned, forced, cache, newest_done)


def _newest_done(runs: Runs, pipeline: Pipeline) -> str | None:
    latest = runs.latest_of(pipeline.digest)
    return latest.run if latest is not None and latest.state == "done" else None


def choose_run(
    opened: OpenPipeline, site: Site, runs: Runs, submission: dict[str, Any] | None = None
) -> RunFile | None:
    """The run to go on with, the finished run when nothing is left to do, or a new one; None when a run was
    finished since the stages were planned, so that they must be planned again."""
    pipeline = opened.pipeline
    with runs.choosing():
        latest = runs.latest_of(pipeline.digest)
        if _newest_done(runs, pipeline) not in (None, opened.newest_done):
            return None
        if latest is not None and (latest.state != "done" or opened.is_done):
            return latest
        return runs.create(
            pipeline=pipeline.digest,
            fingerprints=pipeline.fingerprints,
            experiment=pipeline.config.experiment,
            config=pipeline.config.resolved(),
            site=site.name,
            submission=submission,
        )


def enter_config(run: RunFile, config: PipelineConfig, *, is_tracked: bool) -> str | None:
    """Give a run that is gone on with the config of this command, whose fingerprints are the same: the model
    may lie elsewhere by now. The line that says what of it has no effect, None if all has.

    Of a run that MLflow knows the rest stays: there its experiment and its params are written once.
    """
    given = config.resolved()
    if not is_tracked:
        run.config, run.experiment = given, config.experiment
        return None
    run.config = {**given, **run.config, "inputs": given["inputs"]}
    if config.experiment == run.experiment:
        return None
    return f"run {run.run}: experiment={config.experiment} is for new runs; MLflow has it in {run.experiment}"
