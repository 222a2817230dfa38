"""The last lines of `vico run`: model, quality, whether the router beat its controls, what to do next."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.results.latest import model_path, shown_path
from pipeline.results.quality import Lead, Quality, gate_of, run_quality
from pipeline.results.runs import RunFile
from stages.controls import BY_NAME


def summary_lines(run: RunFile, storage: Path, address: str) -> list[str]:
    """Return the summary of a run that is done; empty for a run without an exported model.

    `address` is the storage as a command names it.
    """
    model = model_path(run, storage)
    if model is None:
        return []
    quality = run_quality(run, storage)
    shown = shown_path(model)
    lines = [f"model:    {shown}"]
    if quality is not None:
        lines += [*_quality_lines(quality), *_router_lines(quality.leads)]
        lines += _gate_lines(quality, run)
    option = "" if Path(address).resolve() == Path("runs").resolve() else f" --storage {address}"
    return [
        *lines,
        f"next:     vico route {shown} PICTURE --out routed.png",
        f"          vico serve {shown}",
        f"          vico export {run.run} OUT --layout flash{option}",
    ]


def _quality_lines(quality: Quality) -> Iterator[str]:
    """Yield the share of the quality that is kept, and the share of the visual tokens that is saved."""
    questions = f"on {quality.num_questions:,} test questions"
    interval = quality.kept_interval
    span = "" if interval is None else f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})"
    kept = "not defined" if quality.kept is None else f"keeps {quality.kept:.3f}{span}"
    yield f"quality:  {kept}, {questions}"
    yield f"tokens:   saves {quality.tokens_saved:.1%} of the visual tokens"


def _router_lines(leads: Mapping[str, Lead]) -> Iterator[str]:
    """Yield whether the router is above its controls, and by how much, over all numbers of tokens."""
    if not leads:
        yield "router:   not compared with any control"
        return
    beaten = all(lead.is_certain for lead in leads.values())
    head = "beats every control" if beaten else "does NOT beat every control with certainty"
    yield f"router:   {head}; lead in quality kept over"
    for name, lead in leads.items():
        span = "" if lead.interval is None else f" ({lead.interval[0]:+.3f} to {lead.interval[1]:+.3f})"
        yield f"            {BY_NAME[name].label}: {lead.difference:+.3f}{span}"


def _gate_lines(quality: Quality, run: RunFile) -> Iterator[str]:
    faults = quality.faults(gate_of(run))
    if not faults:
        return
    for fault in faults:
        yield f"warning:  {fault}"
    if run.accepted:
        yield "          accepted with --accept: it is the candidate in MLflow"
    else:
        yield "          so it is not the candidate in MLflow; `vico run ... --accept` makes it that"
