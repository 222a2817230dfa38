"""The results of an evaluation as Markdown, for the README: `python -m stages.evaluate.table metrics.json`.

The evaluate stage writes it as `table.md`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = (
    "| | tiles compressed | visual tokens saved | exact match | similarity | quality kept | 95 % interval |\n"
    "|---|---:|---:|---:|---:|---:|---:|\n"
)
SHOWN = (1 / 3, 2 / 3)  # shares of compressed tiles; the routed points nearest to them stand in the table
RIVALS = (
    ("random", "random tiles"),
    ("shuffled", "router, decisions shuffled"),
    ("pixel_rule", "pixel rule"),
    ("oracle", "oracle (the tiles' own ratios)"),
)


def evaluation_table(metrics: Mapping[str, Any]) -> str:
    """Markdown: both ends, and the routed points nearest to SHOWN and to the calibrated threshold, each over
    the controls at the same tokens; below it what the router's AUC and the gap closed are.
    """
    rows = [
        row("reference (start model, full rate)", metrics["reference"]),
        row("trained, all tiles at the full rate", metrics["full"]),
    ]
    for number in shown_points(metrics):
        routed = metrics["routed"][number]
        calibrated = routed["threshold"] == metrics["absolute_threshold"]
        rows.append(row(f"**router**{', calibrated threshold' if calibrated else ''}", routed))
        rows += [row(label, metrics[name][number]) for name, label in RIVALS if metrics[name]]
    rows += [row("published rule, one prompt a call", entry) for entry in metrics["served"]]
    rows.append(row("trained, all tiles at the low rate", metrics["compressed"]))
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(f"- {line}" for line in findings(metrics)) + "\n"


def shown_points(metrics: Mapping[str, Any]) -> list[int]:
    """Numbers of the routed points in the table, by tokens saved."""
    routed = metrics["routed"]
    found = {n for n, entry in enumerate(routed) if entry["threshold"] == metrics["absolute_threshold"]}
    if routed:
        shares = [entry["share_compressed"] for entry in routed]
        found |= {min(range(len(routed)), key=lambda n: abs(shares[n] - share)) for share in SHOWN}
    return sorted(found, key=lambda n: routed[n]["tokens_saved"])


def row(label: str, entry: Mapping[str, Any]) -> str:
    cells = (
        label,
        f"{entry['share_compressed']:.1%}",
        f"{entry['tokens_saved']:.1%}",
        f"{entry['exact_match']:.3f}",
        f"{entry['similarity']:.3f}",
        _number(entry["quality_kept"]),
        _span(entry["quality_kept_interval"]),
    )
    return f"| {' | '.join(cells)} |"


def findings(metrics: Mapping[str, Any]) -> list[str]:
    """What is said of the router as a whole, each with its interval."""
    basis, router, choice = metrics["intervals"], metrics["router"], metrics["pixel_rule_choice"]
    lines = [
        f"{metrics['num_samples']:,} test questions on {metrics['num_tiles']:,} tiles; {basis['level']:.0%} "
        f"intervals over {basis['resamples']:,} resamples of {basis['num_units']:,} {basis['unit']}s "
        f"(the samples come from {basis['num_groups']:,} groups)",
        f"router AUC on {router['num_tiles']:,} labelled test tiles: {_number(router['auc'])}, "
        f"{_span(router['auc_interval'])}",
    ]
    if choice["feature"] is not None:
        name, test = choice["feature"], choice["auc_test"][choice["feature"]]
        lines.append(
            f"pixel rule: {name.replace('_', ' ')}, AUC {choice['auc_calib'][name]:.3f} on calib tiles, "
            f"{_number(test)} on test tiles"
        )
    for key, where in (("at_point", "at {saved:.1%} of the tokens saved"), ("over_curve", "over the curve")):
        if not metrics["gap_closed"]:
            continue
        gap, rivals = metrics["gap_closed"][key], metrics["routed_minus"][key]
        where = where.format(saved=gap.get("tokens_saved", 0.0))
        lines.append(
            f"{where}, the router closes {_share(gap['share'])} of the gap from random tiles to the oracle, "
            f"{_span(gap['interval'])}"
        )
        if "pixel_rule" in rivals:
            found = rivals["pixel_rule"]
            lines.append(
                f"{where}, quality kept by the router less that by the pixel rule: "
                f"{_number(found['difference'], '+.3f')}, {_span(found['interval'], '+.3f')}"
            )
    contents = metrics.get("ratio_by_content")
    if contents:
        lines.append(
            "median loss ratio of test tiles by what they show: "
            + ", ".join(
                f"{name} {found['median']:.2f} ({found['tiles']})" for name, found in contents.items()
            )
        )
    return lines


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _share(value: float | None) -> str:
    return "an undefined share" if value is None else f"{value:.0%}"


def _span(ends: list[float] | None, form: str = ".3f") -> str:
    return "interval not defined" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


if __name__ == "__main__":
    print(evaluation_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")  # noqa: T201
