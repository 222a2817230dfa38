"""Shared by the benchmarks: interleaved repetitions, medians with their spread, one JSON object last."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MACHINE_NOTE = "wall seconds; repetitions of all ways are interleaved, so a busy machine slows each alike"


def interleaved(
    ways: dict[str, Callable[[], int]], repetitions: int, unit: str = "samples"
) -> list[dict[str, Any]]:
    """Return one row per way: units per second of every repetition, their median and spread.

    A way does its work and returns the number of units. The order rotates by one per repetition.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repetition in range(repetitions):
        rotated = names[repetition % len(names) :] + names[: repetition % len(names)]
        for name in rotated:
            started = time.perf_counter()
            number = ways[name]()
            rates[name].append(number / (time.perf_counter() - started))
            print(f"{repetition + 1}/{repetitions} {name}: {rates[name][-1]:.0f} {unit}/s", flush=True)
    return [row(name, way_rates, unit) for name, way_rates in rates.items()]


def row(name: str, rates: list[float], unit: str = "samples") -> dict[str, Any]:
    """Return the row of one way: median, spread and every repetition."""
    median = statistics.median(rates)
    return {
        "way": name,
        f"{unit}_per_s": round(median, 1),
        "spread": round((max(rates) - min(rates)) / median, 3),
        "repetitions": [round(rate, 1) for rate in rates],
    }


def append_row(path: Path | None, measured: Mapping[str, Any]) -> None:
    """Append a row as a line of JSON, if there is a file for it: a benchmark that is stopped leaves the rows
    before."""
    if path:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measured) + "\n")


def ratio(rows: list[dict[str, Any]], ours: str, other: str) -> float:
    """Return the median over repetitions of ours / other: neighbours in time share the machine's load."""
    by_name = {row["way"]: row["repetitions"] for row in rows}
    pairs = zip(by_name[ours], by_name[other], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def report(name: str, rows: list[dict[str, Any]], ratios: dict[str, float], as_json: bool) -> None:
    """Print one line per row and ratio; with `as_json`, print everything as one JSON object last."""
    print(MACHINE_NOTE)
    for measured in rows:
        if "spread" in measured:
            key = next(key for key in measured if key.endswith("_per_s"))
            unit = key.removesuffix("_per_s")
            print(f"{measured['way']}: {measured[key]} {unit}/s, spread {measured['spread']:.0%}")
    for key, value in ratios.items():
        print(f"{key}: {value}")
    if as_json:
        print(json.dumps({"name": name, "rows": rows, "ratios": ratios}))
