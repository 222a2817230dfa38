"""Which run a command works on: an unfinished one of the same pipeline, or a new one."""

from typing import Any

from cluster.site import Site
from pipeline.config.pipeline_file import PipelineConfig
from pipeline.planning.request import OpenPipeline, _newest_done
from pipeline.results.runs import RunFile, Runs


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
