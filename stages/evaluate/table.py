"""The results of an evaluation as Markdown, for the README: `python -m stages.evaluate.table metrics.json`.

The evaluate stage writes it as `table.md`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.controls import (
    COMPARED,
    COMPRESSED,
    FEWER_TILES,
    FULL,
    PIXEL_RULE,
    REFERENCE,
    ROUTED,
    SERVED,
    Control,
    PointMetrics,
    calibrated_points,
    point_of,
    points_of,
    resampled_units,
)
from vico.shown_text import markdown

HEAD = (
    "| | tiles compressed | visual tokens saved | exact match | similarity | quality kept | 95 % interval |\n"
    "|---|---:|---:|---:|---:|---:|---:|\n"
)
SHOWN_SHARES = (1 / 3, 2 / 3)
"""Shares of compressed tiles; the table shows the routed points nearest to them."""
_LEAST_DISTANCE = 0.05
"""Share of tiles by which the points of the table differ at least: half the step of `evaluate.shares`."""
_POSITIONS = (("at_point", "at {saved:.1%} of the tokens saved"), ("over_curve", "over the curve"))


def evaluation_table(metrics: Mapping[str, Any]) -> str:
    """Return the points as a Markdown table, then the findings as a list.

    The table shows both ends, the routed point at the calibrated threshold and those nearest to SHOWN_SHARES,
    each above the controls at the same tokens.
    """
    rows = [
        row(f"**{control.label}**{note}" if control is ROUTED else f"{control.label}{note}", point)
        for control, note, point in table_points(metrics)
    ]
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(f"- {line}" for line in findings(metrics)) + "\n"


def table_points(metrics: Mapping[str, Any]) -> list[tuple[Control, str, PointMetrics]]:
    """Return the points of the table in its order: control, what the control's label lacks, point."""
    rows = [(control, "", point_of(metrics, control)) for control in (REFERENCE, FULL)]
    calibrated = calibrated_points(metrics)
    for number in shown_points(metrics):
        point = points_of(metrics, ROUTED)[number]
        rows.append((ROUTED, ", calibrated threshold" if point in calibrated else "", point))
        rows += [
            (control, "", points_of(metrics, control)[number])
            for control in COMPARED
            if control.is_shown and points_of(metrics, control)
        ]
    rows += [
        (FEWER_TILES, f", at most {point['max_tiles']} per picture", point)
        for point in distinct_points(points_of(metrics, FEWER_TILES))
    ]
    rows += [(SERVED, "", point) for point in points_of(metrics, SERVED)]
    return [*rows, (COMPRESSED, "", point_of(metrics, COMPRESSED))]


def shown_points(metrics: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the routed points in the table, by tokens saved.

    A point that compresses nearly as many tiles as a point before it, the calibrated one first, is left out.
    """
    routed, calibrated = points_of(metrics, ROUTED), calibrated_points(metrics)
    shares = [point["share_compressed"] for point in routed]
    numbers = [n for n, point in enumerate(routed) if point in calibrated]
    for share in SHOWN_SHARES if routed else ():
        nearest = min(range(len(routed)), key=lambda n: abs(shares[n] - share))
        if all(abs(shares[nearest] - shares[n]) >= _LEAST_DISTANCE for n in numbers):
            numbers.append(nearest)
    return sorted(numbers, key=lambda n: routed[n]["tokens_saved"])


def distinct_points(fewer_tiles: Sequence[PointMetrics]) -> list[PointMetrics]:
    """Return the points by tokens saved, without limits that cut no picture differently: no grid of square
    pictures has 2 or 3 tiles, for example."""
    points = sorted(fewer_tiles, key=lambda point: (point["tokens_saved"], point["max_tiles"]))
    return [
        point
        for number, point in enumerate(points)
        if number == 0 or point["tokens_saved"] != points[number - 1]["tokens_saved"]
    ]


def row(label: str, point: PointMetrics) -> str:
    """Return one row of the table."""
    cells = (
        label,
        f"{point['share_compressed']:.1%}",
        f"{point['tokens_saved']:.1%}",
        f"{point['exact_match']:.3f}",
        f"{point['similarity']:.3f}",
        _number(point["quality_kept"]),
        _span(point["quality_kept_interval"]),
    )
    return f"| {' | '.join(cells)} |"


def findings(metrics: Mapping[str, Any], shown: Callable[[str], str] = markdown) -> list[str]:
    """Return one line for each statement about the router as a whole, with its interval.

    `shown` makes names of the records fit for the page; by default it is Markdown.
    """
    basis, router = metrics["intervals"], metrics["router"]
    lines = [
        f"{metrics['num_samples']:,} test questions on {metrics['num_tiles']:,} tiles; {basis['level']:.0%} "
        f"intervals over {basis['resamples']:,} resamples of {resampled_units(basis)}",
        f"router AUC on {router['num_tiles']:,} labelled test tiles: {_number(router['auc'])}, "
        f"{_span(router['auc_interval'])}",
    ]
    return [*lines, *_pixel_rule_line(metrics), *_gap_lines(metrics), *_content_line(metrics, shown)]


def _pixel_rule_line(metrics: Mapping[str, Any]) -> Iterator[str]:
    fit = metrics.get("pixel_rule_fit")  # results of an older evaluate stage have another control
    if fit and fit["weights"] is not None:
        yield (
            f"{PIXEL_RULE.label}: AUC {_number(fit['auc_calib'][PIXEL_RULE.name])} on calib tiles, "
            f"{_number(fit['auc_test'][PIXEL_RULE.name])} on test tiles"
        )


def _gap_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    for key, position in _POSITIONS if metrics["gap_closed"] else ():
        gap, differences = metrics["gap_closed"][key], metrics["routed_minus"][key]
        position = position.format(saved=gap.get("tokens_saved", 0.0))
        yield (
            f"{position}, the router closes {_share(gap['share'])} of the gap from random tiles to the "
            f"oracle, {_span(gap['interval'])}"
        )
        for control, name in ((PIXEL_RULE, "the pixel rule"), (FEWER_TILES, "fewer tiles")):
            difference = differences.get(control.name, {"difference": None})
            if difference["difference"] is not None:
                yield (
                    f"{position}, quality kept by the router minus that of {name}: {_difference(difference)}"
                )
        if metrics["oracle_split"]:
            split = metrics["oracle_split"][key]
            yield (
                f"{position}, quality kept by the blind oracle minus that of the router: "
                f"{_difference(split['better_router'])}; by the oracle on the same tiles minus that of the "
                f"blind one, which only the question tells: {_difference(split['question'])}"
            )


def _content_line(metrics: Mapping[str, Any], shown: Callable[[str], str]) -> Iterator[str]:
    contents = metrics.get("ratio_by_content")
    if contents:
        ratios = (
            f"{shown(name)} {ratio['median']:.2f} ({ratio['tiles']})" for name, ratio in contents.items()
        )
        yield f"median loss ratio of test tiles by what they show: {', '.join(ratios)}"


def _difference(difference: Mapping[str, Any]) -> str:
    return f"{_number(difference['difference'], '+.3f')}, {_span(difference['interval'], '+.3f')}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _share(value: float | None) -> str:
    return "an undefined share" if value is None else f"{value:.0%}"


def _span(ends: Sequence[float] | None, form: str = ".3f") -> str:
    return "interval not defined" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


if __name__ == "__main__":
    print(evaluation_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")  # noqa: T201
