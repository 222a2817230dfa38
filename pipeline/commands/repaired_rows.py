"""The work of `vico data retry`: one shard stage per file of repaired rows, and what each file repaired."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.site import Site
from data_prep.records.rejection import shown_line
from pipeline.config.graph import pipeline_graph
from pipeline.planning.request import RunRequest
from pipeline.results.run_results import record_of
from pipeline.results.runs import Runs
from pipeline.running.run_command import RunResult
from pipeline.running.runner import run_pipeline
from pipeline.terminal.progress import Display

NOTHING_REPAIRED = 1  # exit code


@dataclass(frozen=True)
class RepairedFile:
    """A file of repaired rows: how many rows it has, and how many of them are in the new shards."""

    file: str
    tried: int
    written: int


def retry_files(
    config: Path, site: Site, overrides: Sequence[str], files: Sequence[Path], display: Display
) -> tuple[RunResult, list[RepairedFile]]:
    """Shard the rows of each file beside the shards of the files before it.

    Return the last result, with what each finished file repaired.
    """
    repaired: list[RepairedFile] = []
    num_written = 0
    for number in range(len(files) + 1):
        first_files = json.dumps([str(path) for path in files[:number]])
        with_files = (*overrides, f"inputs.repaired={first_files}")
        result = run_pipeline(
            RunRequest(config, site, overrides=with_files, until="shard"), pipeline_graph(), display
        )
        if result.exit_code:
            break
        before, num_written = num_written, _num_written(site, result)
        if number:
            file = files[number - 1]
            with file.open("rb") as lines:
                num_rows = sum(1 for line in lines if line.strip())
            repaired.append(RepairedFile(str(file), num_rows, num_written - before))
    return result, repaired


def outcome(config: Path, repaired: Sequence[RepairedFile]) -> list[str]:
    """Return what each file repaired, and how to use the shards if that is anything."""
    lines = [f"{file.file}: {file.written} of {file.tried} rows repaired" for file in repaired]
    last = max((n for n, file in enumerate(repaired, start=1) if file.written), default=0)
    if last:
        names = json.dumps([file.file for file in repaired[:last]])
        lines.append(f"use these shards with inputs.repaired: {names} in {config}")
    return lines


def nothing_repaired(site: Site, result: RunResult, repaired: Sequence[RepairedFile]) -> str:
    """Return the message for files that repaired no row, with the first reason; "" if one did."""
    if any(file.written for file in repaired):
        return ""
    run = Runs(site.storage).named(result.run)
    run_record = record_of(run, "shard", site.storage)
    ledger = None if run_record is None else run_record.output / "quarantine.jsonl"
    addresses = {
        (row.get("source"), row.get("line")) for file in repaired for row in _json_lines(Path(file.file))
    }
    reasons = ""
    for row in _json_lines(ledger) if ledger is not None and ledger.is_file() else ():
        if (row["source"], row["line"]) in addresses:
            reasons = f" ({row['source']} line {shown_line(row)}: {row['reason']}, {row['message']})"
            break
    names = ", ".join(file.file for file in repaired)
    return f"{names}: no row is repaired{reasons}; correct the rows and run the command again"


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:  # splitlines would also break at characters inside a text
        yield from map(json.loads, filter(str.strip, file))


def _num_written(site: Site, result: RunResult) -> int:
    run_record = record_of(Runs(site.storage).named(result.run), "shard", site.storage)
    assert run_record is not None, f"run {result.run} is done, so its shard stage has a record"
    return int(run_record.record.counts["written"])
