"""Which run a command works on: an unfinished one of the same pipeline, or a new one."""

from cluster.site import Site
from pipeline.planning.request import OpenPipeline, newest_done_run
from pipeline.results.runs import RunFile, Runs


def choose_run(opened: OpenPipeline, site: Site, runs: Runs) -> RunFile | None:
    """Return the unfinished run to resume, the finished run if nothing is left to do, or a new run.

    None: a run was finished after the stages were planned, so they must be planned again.
    """
    pipeline = opened.pipeline
    with runs.locked():
        latest = runs.latest_of(pipeline.digest)
        if newest_done_run(runs, pipeline) not in (None, opened.newest_done):
            return None
        if latest is not None and (latest.state != "done" or opened.is_done):
            return latest
        return runs.create(
            pipeline=pipeline.digest,
            fingerprints=pipeline.fingerprints,
            experiment=pipeline.config.experiment,
            config=pipeline.config.resolved(),
            site=site.name,
        )
