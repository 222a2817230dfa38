"""What a command asks for, and the pipeline that was read, checked and planned for it. Used by run, plan and
submit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.site import Site
from pipeline.config.graph import Graph
from pipeline.config.joint_checks import check_together
from pipeline.config.pipeline_file import config_with_faults
from pipeline.config.split_needs import check_split_needs
from pipeline.identity.remembered_digests import InputDigests
from pipeline.planning.plan import PlannedStage, plan
from pipeline.planning.tasks import Pipeline, resolve
from pipeline.results.runs import Runs
from vico.errors import Faults, UserError


@dataclass(frozen=True)
class RunRequest:
    """What the command line asks for."""

    config: Path
    site: Site
    overrides: tuple[str, ...] = ()
    """`a.b=value` for keys of the pipeline file."""
    force: tuple[str, ...] = ()
    """Stages to run again, with all stages that depend on them."""
    until: str | None = None
    """The last stage to run; None: all stages."""
    wait_s: float = 0.0
    """How long to wait for another driver that holds the run or a stage."""
    site_file: str | None = None
    """Absolute path of the file that `site` was read from; None: there is none."""
    accept: bool = False
    """Whether the model becomes the candidate even if it does not pass the quality gate."""
    strict_code: bool = False
    """Whether to run stages again whose source files have changed."""


@dataclass(frozen=True)
class OpenPipeline:
    """The pipeline of a request: read and checked, with fingerprints and plan."""

    pipeline: Pipeline
    planned: list[PlannedStage]
    forced: frozenset[str]
    """Stages to run in any case: those of --force and all that depend on them."""
    cache: InputDigests
    newest_done: str | None
    """The newest run of this pipeline, if it was done before the stages were planned."""

    @property
    def is_done(self) -> bool:
        return not self.stages_to_run

    @property
    def stages_to_run(self) -> set[str]:
        return {stage.stage for stage in self.planned if stage.action == "run"}

    def check_can_run(self) -> None:
        """Raise UserError if the user must decide something before a stage can run."""
        refusals = [stage.refused for stage in self.planned if stage.refused]
        if refusals:
            raise UserError("\n".join(refusals))


def open_pipeline(
    request: RunRequest, graph: Graph, notify: Callable[[str], None] = lambda text: None
) -> OpenPipeline:
    """Read and check the config and plan its stages; writes nothing to the storage. Raises UserError.

    `notify` gets lines about inputs that take long to read.
    """
    faults = Faults()
    config = config_with_faults(request.config, graph, request.overrides, faults)
    with faults.collected():
        check_together(config, request.site)
    requested = config.stages_of(graph).until(request.until)
    with faults.collected():
        check_split_needs(config, requested.names)
    for name in request.force:
        with faults.collected():
            requested.check_name(name, "--force")
    cache = InputDigests(request.site.storage, notify)
    pipeline = resolve(requested, config, cache, faults)
    newest_done = newest_done_run(Runs(request.site.storage), pipeline)
    forced = frozenset(requested.dependents(request.force))
    cache.remember()
    planned = plan(pipeline, request.site.storage, forced, strict_code=request.strict_code)
    return OpenPipeline(pipeline, planned, forced, cache, newest_done)


def newest_done_run(runs: Runs, pipeline: Pipeline) -> str | None:
    """Return the newest run of the pipeline if it is done, else None."""
    latest = runs.latest_of(pipeline.digest)
    return latest.run if latest is not None and latest.state == "done" else None
