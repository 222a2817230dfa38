"""What the evaluate stage measured: sentences, figures of the head of the page, and tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.run_files import Missing, RunFiles
from pipeline.report.tables import Row, Table, number, percent, span
from pipeline.results.quality import EVALUATED_STAGE, Quality, gate_of, quality_of
from pipeline.results.runs import RunFile
from stages.controls import (
    COMPARED,
    FEWER_TILES,
    LISTED,
    ROUTED,
    Control,
    PointMetrics,
    calibrated_points,
    points_of,
)
from stages.evaluate.table import findings, table_points
from stages.outputs import METRICS_FILE

_POINT_COLUMNS = (
    "tiles compressed",
    "visual tokens saved",
    "exact match",
    "similarity",
    "quality kept",
    "95 % interval",
)
_QUALITY = (
    "Quality is the similarity of the answers to the expected ones (ANLS), as a share of what the start "
    "model reaches with all tiles at the full rate."
)


@dataclass(frozen=True)
class Fact:
    """A number of the head of the page."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """The results of an evaluation."""

    facts: Sequence[Fact]
    sentences: Sequence[str]
    points: Table
    all_points: Table
    leads: Table | None
    kinds: Table
    findings: Sequence[str]


def evaluation(files: RunFiles) -> Mapping[str, Any]:
    """Return metrics.json of the evaluate stage; raise Missing."""
    metrics: Mapping[str, Any] = files.json(EVALUATED_STAGE, METRICS_FILE)
    return metrics


def measured(files: RunFiles) -> Measured:
    """Return the results of a run's evaluate stage; raise Missing."""
    metrics = evaluation(files)
    quality = quality_of(metrics)
    if quality is None:
        raise Missing("The evaluation has no point at the calibrated threshold.")
    return Measured(
        facts=_facts(metrics, quality),
        sentences=[*_sentences(metrics, quality), *_gate_sentences(quality, files.run)],
        points=_points_table(metrics),
        all_points=_all_points_table(metrics),
        leads=_leads_table(metrics),
        kinds=_kinds_table(metrics),
        findings=findings(metrics, str),
    )


def _facts(metrics: Mapping[str, Any], quality: Quality) -> list[Fact]:
    kept_note = "not defined" if quality.kept_interval is None else span(quality.kept_interval)
    router = metrics["router"]
    return [
        Fact(percent(quality.tokens_saved), "of the visual tokens saved", "at the calibrated threshold"),
        Fact(number(quality.kept), "of the quality kept", f"95 % interval {kept_note}"),
        Fact(number(router["auc"]), "AUC of the router", f"95 % interval {span(router['auc_interval'])}"),
        Fact(f"{quality.num_questions:,}", "test questions", f"on {metrics['num_tiles']:,} tiles"),
    ]


def _sentences(metrics: Mapping[str, Any], quality: Quality) -> list[str]:
    """Return what the router reached at its calibrated threshold, and against what."""
    if quality.kept is None:
        return [
            f"The router saves {percent(quality.tokens_saved)} of the visual tokens. The quality that it "
            "keeps is not defined: the start model has a similarity of 0."
        ]
    interval = quality.kept_interval
    within = "" if interval is None else f" (95 % interval {span(interval)})"
    sentences = [
        f"At its calibrated threshold the router saves {percent(quality.tokens_saved)} of the visual tokens "
        f"and keeps {quality.kept:.3f} of the quality{within}, measured on {quality.num_questions:,} test "
        "questions that no stage trained or calibrated on.",
        _QUALITY,
    ]
    [calibrated] = calibrated_points(metrics)
    position = points_of(metrics, ROUTED).index(calibrated)
    for is_bound, what in (
        (False, "Other choices of as many tiles keep"),
        (True, "Bounds, which know the loss ratios of the test tiles, keep"),
    ):
        others = [
            f"{control.label} {points_of(metrics, control)[position]['quality_kept']:.3f}"
            for control in COMPARED
            if control.is_shown and control.is_bound == is_bound and points_of(metrics, control)
        ]
        if others:
            sentences.append(f"{what}: {'; '.join(others)}.")
    return [*sentences, *_lead_sentences(quality), *_fewer_tiles_sentence(metrics)]


def _lead_sentences(quality: Quality) -> list[str]:
    """Return which controls the router is above, over all numbers of tokens."""
    labels = {control.name: control.label for control in (*COMPARED, FEWER_TILES)}
    sure = [labels[name] for name, lead in quality.leads.items() if lead.is_certain]
    unsure = [labels[name] for name, lead in quality.leads.items() if not lead.is_certain]
    sentences = []
    if sure:
        sentences.append(
            "Over all numbers of tokens the router keeps more quality, with the whole interval above 0, than "
            f"{'; '.join(sure)}."
        )
    if unsure:
        sentences.append(
            f"That it keeps more than {'; '.join(unsure)} is not certain: the interval is not above 0."
        )
    return sentences or ["The router was not compared with any control."]


def _fewer_tiles_sentence(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the comparison with fewer tiles at one point, if their curve is too short for one over all."""
    leads = metrics.get("routed_minus") or {}
    over_curve, at_point = (leads.get(name, {}) for name in ("over_curve", "at_point"))
    lead = at_point.get(FEWER_TILES.name, {"difference": None})
    if lead["difference"] is None or over_curve.get(FEWER_TILES.name, {}).get("difference") is not None:
        return
    size, direction = abs(lead["difference"]), "more" if lead["difference"] >= 0 else "less"
    interval = span(lead["interval"], "+.3f")
    yield (
        f"With {percent(at_point['tokens_saved'])} of the tokens saved, the router keeps {size:.3f} "
        f"{direction} than {FEWER_TILES.label} (95 % interval of the difference {interval})."
    )


def _gate_sentences(quality: Quality, run: RunFile) -> list[str]:
    gate = gate_of(run)
    faults = quality.faults(gate)
    if not faults:
        return [
            f"It passes the quality gate (at least {gate.min_questions:,} questions and {gate.min_kept:g} of "
            "the quality)."
        ]
    accepted = "; the model was accepted all the same, with --accept" if run.accepted else ""
    return [f"It does not pass the quality gate: {'; '.join(faults)}{accepted}."]


def _points_table(metrics: Mapping[str, Any]) -> Table:
    calibrated = calibrated_points(metrics)
    rows = [
        Row((f"{control.label}{note}", *_point_cells(point)), point in calibrated, control is ROUTED)
        for control, note, point in table_points(metrics)
    ]
    caption = "Operating points: the router, and below it the controls with as many compressed tiles"
    return Table(caption, ("choice of tiles", *_POINT_COLUMNS), rows, num_numbers=6)


def _all_points_table(metrics: Mapping[str, Any]) -> Table:
    calibrated = calibrated_points(metrics)
    rows = [
        Row((control.label, _setting(control, point), *_point_cells(point)), is_marked=point in calibrated)
        for control in LISTED
        if control.is_shown
        for point in sorted(points_of(metrics, control), key=lambda point: point["tokens_saved"])
    ]
    return Table(
        "All measured points", ("choice of tiles", "threshold", *_POINT_COLUMNS), rows, num_numbers=7
    )


def _setting(control: Control, point: PointMetrics) -> str:
    if "threshold" in point:
        return f"{point['threshold']:.6g}"
    return f"{point['max_tiles']} tiles at most" if "max_tiles" in point else "-"


def _point_cells(point: PointMetrics) -> tuple[str, ...]:
    return (
        percent(point["share_compressed"]),
        percent(point["tokens_saved"]),
        number(point["exact_match"]),
        number(point["similarity"]),
        number(point["quality_kept"]),
        span(point.get("quality_kept_interval")),
    )


def _leads_table(metrics: Mapping[str, Any]) -> Table | None:
    """Return quality kept by the router minus that of each control; None without a comparison."""
    leads = metrics.get("routed_minus")
    if not leads:
        return None
    rows = []
    for control in (*(c for c in COMPARED if c.is_shown), FEWER_TILES):
        both = [leads[place].get(control.name) for place in ("at_point", "over_curve")]
        if any(both):
            cells = [
                cell
                for lead in both
                for cell in (
                    ("-", "-")
                    if not lead
                    else (number(lead["difference"], "+.3f"), span(lead["interval"], "+.3f"))
                )
            ]
            rows.append(Row((control.label, *cells)))
    saved = percent(leads["at_point"]["tokens_saved"])
    columns = ("control", f"with {saved} saved", "95 % interval", "over all savings", "95 % interval")
    return Table("Quality kept by the router minus that of each control", columns, rows, num_numbers=4)


def _kinds_table(metrics: Mapping[str, Any]) -> Table:
    """Return the routed results at the calibrated threshold by kind of record."""
    position = points_of(metrics, ROUTED).index(calibrated_points(metrics)[0])
    rows = []
    for kind, of_kind in metrics["by_kind"].items():
        point = of_kind["routed"][position]
        cells = (
            kind,
            f"{of_kind['num_samples']:,}",
            percent(point["tokens_saved"]),
            number(of_kind["reference"]["similarity"]),
            number(point["similarity"]),
            number(point["quality_kept"]),
        )
        rows.append(Row(cells))
    columns = (
        "kind of record",
        "questions",
        "tokens saved",
        "similarity, start model",
        "similarity, routed",
        "kept",
    )
    return Table("Results at the calibrated threshold by kind of record", columns, rows, num_numbers=5)
