"""A request read, checked and planned, and the run it belongs to. Used by run, plan and submit."""

from dataclasses import dataclass
from pathlib import Path

from cluster.site import Site
from pipeline.config.graph import Graph
from pipeline.config.pipeline_file import check_together, load_config
from pipeline.identity.file_digests import DigestCache
from pipeline.planning.plan import PlannedStage, plan
from pipeline.planning.tasks import Pipeline, resolve
from pipeline.results.runs import Runs


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
