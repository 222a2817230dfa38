"""The contents of a report: everything that the page shows of a run, in its order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from cluster.site import Site
from pipeline.report import machines, routing
from pipeline.report.answers import changed_answers
from pipeline.report.figures import Picture, quality_curve, training_figures
from pipeline.report.lineage import Lineage, lineage, stage_times
from pipeline.report.measured import Measured, measured
from pipeline.report.run_files import Part, RunFiles, part
from pipeline.report.tables import Table, moment
from pipeline.results.runs import ENDED, RunFile
from pipeline.results.states import run_state


@dataclass(frozen=True)
class Report:
    """A run and the parts of its page."""

    run: RunFile
    state: str
    storage: str
    created: str
    progress: str
    measured: Part[Measured]
    curve: Part[Picture]
    pictures: Part[Picture]
    answers: Part[Table]
    ratios: Part[Picture]
    contents: Part[Table]
    losses: Part[Picture]
    router: Part[Table]
    reliability: Part[Picture]
    training: Part[list[Picture]]
    lineage: Part[Lineage]
    times: Part[Table]
    machines: Part[Table]
    usage: Part[Table]
    main_packages: Part[Table]
    all_packages: Part[list[str]]

    def missing(self) -> Iterator[str]:
        """Yield why parts of the page are not there, each reason once."""
        parts = [getattr(self, field.name) for field in fields(self)]
        yield from dict.fromkeys(each.missing for each in parts if isinstance(each, Part) and each.missing)


def report_of(run: RunFile, site: Site) -> Report:
    """Read what the report of a run shows; parts that cannot be shown say why."""
    files = RunFiles.of(run, site.storage)
    return Report(
        run=run,
        state=run_state(run),
        storage=site.storage_address,
        created=moment(run.created),
        progress=_progress(run),
        measured=part(lambda: measured(files)),
        curve=part(lambda: quality_curve(files)),
        pictures=part(lambda: routing.routed_pictures(files)),
        answers=part(lambda: changed_answers(files)),
        ratios=part(lambda: routing.ratios_by_content(files)),
        contents=part(lambda: routing.contents_table(files)),
        losses=part(lambda: routing.losses_by_kind(files)),
        router=part(lambda: routing.router_table(files)),
        reliability=part(lambda: routing.reliability(files)),
        training=part(lambda: training_figures(files)),
        lineage=part(lambda: lineage(files)),
        times=part(lambda: stage_times(files)),
        machines=part(lambda: machines.machines_table(files)),
        usage=part(lambda: machines.usage_table(files)),
        main_packages=part(lambda: machines.main_packages(files)),
        all_packages=part(lambda: machines.all_packages(files)),
    )


def _progress(run: RunFile) -> str:
    """Return a sentence on how far the run has come."""
    done = [name for name, entry in run.stages.items() if entry.state == "done"]
    rest: Sequence[str] = [name for name in run.stages if name not in done]
    if not rest:
        return f"All {len(done)} stages are done."
    verb = "Not done" if run.state in ENDED else "Not done yet"
    return f"{len(done)} of {len(run.stages)} stages are done. {verb}: {', '.join(rest)}."
