"""Run a pipeline and its ablations in one storage, and compare them: `python -m examples.ablations CONFIG`.

An ablation is a small YAML file with the keys that differ (configs/ablations/). Stages that it does not
change are reused from the base. The table shows each at its calibrated threshold and, with half of the visual
tokens saved and over the whole curve, its difference from the base on the same test questions and resamples.
The same command resumes what was stopped; finished runs are only read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.ablations.compare import Evaluation, Row, compared, evaluation_of
from examples.ablations.runs import BASE, ROOT, Ablation, Command, ablations
from pipeline.results.runs import RunFile, Runs
from vico.errors import UserError


def main() -> None:
    arguments = _arguments()
    command = Command(arguments.config, arguments.storage, arguments.site, tuple(arguments.set))
    try:
        chosen = ablations(arguments.folder, arguments.only)
        rows, failed = compared_runs(command, chosen)
    except UserError as error:
        sys.exit(str(error))
    if arguments.json:
        text = json.dumps({"base": str(arguments.config), "rows": [row.as_json() for row in rows]}, indent=1)
    else:
        text = table(rows, {ablation.name: ablation.description for ablation in chosen})
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if failed:
        sys.exit("\n".join(failed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="the pipeline file of the base")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="default: all ablations")
    parser.add_argument("--folder", type=Path, default=ROOT / "configs" / "ablations")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="a folder; default: runs")
    parser.add_argument("--site", help="site file, or the name of one in sites/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def compared_runs(command: Command, chosen: Sequence[Ablation]) -> tuple[list[Row], list[str]]:
    """Run all and return the rows of those that are done, and one line for each that failed.

    Raises UserError if the base fails, since nothing can then be compared.
    """
    base: Evaluation | None = None
    base_run: RunFile | None = None
    rows, failed = [], []
    for ablation in chosen:
        print(f"{ablation.name}: vico {' '.join(command.arguments(ablation))}", file=sys.stderr)
        try:
            run = command.run(ablation)
            evaluation = evaluation_of(run, command.storage, base_run)
            if base is None:
                base, base_run = evaluation, Runs(command.storage).named(run)
            rows.append(compared(ablation.name, evaluation, base))
        except UserError as error:
            if base is None:
                raise
            failed.append(str(error))
    return rows, failed


HEAD = (
    "| | AUC | tokens saved | quality kept | 95 % interval | kept at half | 95 % interval "
    "| minus base at half | 95 % interval | minus base over the curve | 95 % interval | own minutes |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
)


def table(rows: Sequence[Row], descriptions: dict[str, str]) -> str:
    """Return the rows as Markdown, and what each ablation changes.

    `own minutes` is the time of the stages that the base does not have; of the base, of all its stages.
    """
    lines = [
        "| "
        + " | ".join(
            (
                row.name,
                _shown(row.auc),
                f"{row.tokens_saved:.1%}",
                _shown(row.kept),
                _span(row.kept_interval),
                _shown(row.kept_at_half),
                _span(row.kept_at_half_interval),
                *(("", "", "", "") if row.name == BASE else _differences(row)),
                f"{(row.seconds if row.name == BASE else row.own_seconds) / 60:.1f}",
            )
        )
        + " |"
        for row in rows
    ]
    notes = [f"- {row.name}: {descriptions[row.name]}" for row in rows]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(notes)


def _differences(row: Row) -> tuple[str, str, str, str]:
    return (
        _shown(row.minus_base_at_half, "+.3f"),
        _span(row.minus_base_at_half_interval, "+.3f"),
        _shown(row.minus_base_over_curve, "+.3f"),
        _span(row.minus_base_over_curve_interval, "+.3f"),
    )


def _shown(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _span(ends: Sequence[float] | None, form: str = ".3f") -> str:
    return "-" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


if __name__ == "__main__":
    main()
